"""Tables from files: whatever form they have, columns are read by their names in the file and nothing is guessed.

`files` finds the files that a recipe names, `delimited`, `json_lines`, `columnar` and `sequences` read them, `columns`
gives their columns our names, and `cells` turns a column into text, numbers, seconds or lists.
"""

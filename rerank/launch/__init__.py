"""From a command line to a finished stage: recipes, run folders, signals."""

"""Requests as a source: lists that were shown, with graded feedback, instead of single interactions.

`forms` and `metarank` read a log into the tables of `raw`, which `checks` refuses or lets pass; `log` numbers users
and items, `splits` divides the requests, `histories` joins what a user took before, and `prepare` writes the tables.
"""

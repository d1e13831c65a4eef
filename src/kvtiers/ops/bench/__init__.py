"""`kvtiers bench`: the machine's limit, us, and a peer where one is installed, measured in turns in one run.

`measure.py` and `figures.py` are the arithmetic; one file for each subject measures; `run.py` puts them together.
"""

"""A model of device time, held to account by what an H200 measured.

`counts` counts what the kernels of a pass execute and move, `model` turns counts into time with
constants that `calibration` fits to a results file, and `report` compares the predictions with the
least possible time and with what was measured.
"""

"""Moves code from torch.ao's FX quantization API to :mod:`fxquant.compat`.

``python -m fxquant.migrate PATH`` lists what it would rewrite and what changes behaviour, with file
and line; ``--write`` rewrites. It works on the syntax tree, so formatting and comments stay.
"""

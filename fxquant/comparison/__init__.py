"""compare: the float model and its int8 form side by side, op by op; see :mod:`.compare`."""

"""plan_mixed_precision: a precision for every layer under a budget; see :mod:`.planner`."""

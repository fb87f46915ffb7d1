"""A graph runtime for lowered models: int8 kernels in C++, and plans that run without Python."""

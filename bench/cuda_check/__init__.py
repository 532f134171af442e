"""`python -m bench.cuda_check`: all that is checked and measured on a CUDA device.

A part is a list of measurements, each in a process of its own, so that its memory is clean and a
crash costs nothing but itself. A measurement yields objects that are printed as lines of JSON as
soon as they are known; the parent gathers them in a file and judges them by the goals. Only
measurements load torch.
"""

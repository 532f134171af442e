"""From the model settings to a Hugging Face folder and its named tensors.

`resolve` finds the folder, `ModelFiles.open_weights` opens its tensors. A GGUF is converted to such
a folder once and never read again.
"""

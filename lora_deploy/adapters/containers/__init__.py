"""Files that hold tensors by name, other than safetensors and ``torch.save``; a container is one module here.

Promise: what a header claims is checked against the file before memory is taken for it; nothing is unpickled; damage of
any sort is a ``MalformedAdapterError``.
"""

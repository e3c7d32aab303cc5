"""Ways in and out: activations as files and as values of other libraries.

| module | what it knows |
|---|---|
| `tensors` | safetensors: written and read back, bit for bit |
| `tables` | Parquet: one row an example |
| `views` | tensors of torch, datasets of xarray |
| `neurox` | the activation files of NeuroX, read in |

A file is written beside its place and renamed, so that half of one is never found. Nothing is pickled.
"""

# SPDX-License-Identifier: Apache-2.0
"""Sleep mode: an engine gives its device memory back and takes it again. `backend.py` is what vLLM calls, `pool.py` the memory that can be given back,
`cann.py` CANN's calls for it, and `limits.py` says with what it cannot be used."""

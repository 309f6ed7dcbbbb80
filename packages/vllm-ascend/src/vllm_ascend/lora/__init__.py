# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: the products of vLLM's LoRA layers on this platform (`punica.py`, `products.py`), the adapters that are loaded (`manager.py`), and with what
they cannot be used (`limits.py`)."""

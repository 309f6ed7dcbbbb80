# SPDX-License-Identifier: Apache-2.0
"""What users switch on, each alone and each pair together, on tiny models beside Hugging Face transformers: docs/features.md, which `nox -s features` writes."""

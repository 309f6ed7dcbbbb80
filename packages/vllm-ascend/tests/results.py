# SPDX-License-Identifier: Apache-2.0
"""What the runs behind a page of docs/ have found, as JSON, and the page."""

import json
from importlib.metadata import version

__all__ = ["write"]

VERSIONS = ("vllm", "torch", "torch-npu", "transformers")


def write(file, key, found, page, render):
    """Write both, each at once or not at all.

    Args:
        file: of the results.
        key: under which they stand in it, beside the versions of what they were found with.
        found: the results.
        page: file of the page, or None.
        render: results, as `file` has them, -> the page.
    """
    results = {"versions": {name: version(name).split("+")[0] for name in VERSIONS}, key: found}
    put(file, json.dumps(results, indent=1) + "\n")
    if page is not None:
        put(page, render(results))


def put(file, text):
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)

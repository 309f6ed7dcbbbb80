# SPDX-License-Identifier: Apache-2.0
"""What vLLM says to configurations, in one process and without engines: asking.main(JOBS.json, ANSWERS.json)."""

import json
from pathlib import Path

from features.trial import look_at_classes_here


def main(jobs_file, answers_file):
    """Why each configuration is refused, or null."""
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs

    look_at_classes_here()
    answers = {}
    for name, arguments in json.loads(Path(jobs_file).read_text()).items():
        try:
            EngineArgs(**arguments).create_engine_config()
            answers[name] = None
        except ValidationError as error:
            answers[name] = " ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        except ValueError as error:
            answers[name] = str(error)
    Path(answers_file).write_text(json.dumps(answers))

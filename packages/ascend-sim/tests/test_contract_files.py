# SPDX-License-Identifier: Apache-2.0
"""Reading files of rules: what is wrong in one is said with its file, its rule and its key."""

import re
import subprocess
import sys

import pytest
from ascend_sim.contracts import contract, contracts

RULE = {
    "id": '"npu_x.size"',
    "about": '"range"',
    "rule": '"size is at most 8"',
    "verdict": '"enforced"',
    "source": '{ seen = "here" }',
}


def write(folder, operator="npu_x", head="", **changes):
    """A file of one rule; a change of None leaves the key out."""
    rule = {key: value for key, value in (RULE | changes).items() if value is not None}
    lines = [f'operator = "{operator}"', head, "[[rules]]", *(f"{key} = {value}" for key, value in rule.items())]
    (folder / "npu_x.toml").write_text("\n".join(lines))


def test_a_rule_is_read_with_its_numbers(tmp_path):
    write(tmp_path, head='called_by = ["a.kernels"]', least="1", most="8", chips='["A2"]')
    (one,) = contracts(tmp_path)
    assert (one.operator, one.called_by, one.rules[0].least, one.rules[0].most, one.rules[0].chips) == (
        "npu_x", ("a.kernels",), 1, 8, ("A2",),
    )  # fmt: skip
    assert contract("npu_x", tmp_path) == one


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"operator": "npu_y"}, "npu_x.toml: operator must be the name of the file, got 'npu_y'"),
        ({"head": "author = 1"}, "npu_x.toml: the file has the unknown key 'author'"),
        ({"id": '"npu_y.size"'}, "id must be 'npu_x.' and a short name, got 'npu_y.size'"),
        ({"id": "3"}, "npu_x.toml: 3: id must be a string, got 3"),
        ({"about": '"colour"'}, "npu_x.size: about must be one of dtype, rank"),
        ({"verdict": '"maybe"'}, "npu_x.size: verdict must be one of enforced, departed from, cannot be shown, got 'maybe'"),
        ({"verdict": '"departed from"'}, "npu_x.size: reason must be given"),
        ({"reason": '"why"'}, "npu_x.size: reason must be given where the verdict is not 'enforced', and only there"),
        ({"rule": None}, "npu_x.size: a rule lacks rule"),
        ({"must": "8"}, "npu_x.size: a rule has the unknown key 'must'"),
        ({"most": '"8"'}, "npu_x.size: most must be an integer, got '8'"),
        ({"least": "9", "most": "8"}, "npu_x.size: least must not exceed most, got 9 and 8"),
        ({"chips": '["A5"]'}, "npu_x.size: chips must be one of A2, A3, got 'A5'"),
        ({"chips": "[]"}, "npu_x.size: chips must name at least one chip"),
        ({"source": '{ entry = "npu_x" }'}, "npu_x.size: a source is entry and text, meta and text, or seen alone"),
        ({"source": '{ where = "npu_x" }'}, "npu_x.size: source has the unknown key 'where'"),
        ({"head": "rules ="}, "npu_x.toml: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, changes, says):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(says)):
        contracts(tmp_path)


def test_an_id_is_used_once(tmp_path):
    write(tmp_path)
    path = tmp_path / "npu_x.toml"
    text = path.read_text()
    path.write_text(text + "\n" + text[text.index("[[rules]]") :])
    with pytest.raises(ValueError, match=r"each id must be used once, got npu_x\.size more often"):
        contracts(tmp_path)


def test_an_operator_without_a_contract_is_an_error(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"operator must be one with a contract \(npu_x\), got 'npu_z'"):
        contract("npu_z", tmp_path)


def test_the_page_is_written_as_a_whole_or_not_at_all(tmp_path):
    def write_page(*arguments):
        command = [sys.executable, "-m", "ascend_sim.contracts", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert write_page(str(tmp_path / "kernels.md")).returncode == 0
    assert (tmp_path / "kernels.md").read_text().startswith("# Kernels")
    missing = write_page(str(tmp_path / "none" / "kernels.md"))
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
    assert "No such file" in missing.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.md"]

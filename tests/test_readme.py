"""Every README example runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python|yaml)\n(.*?)```", TEXT, re.S)
INSTALLS = "python3 -m venv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A place that looks like a checkout, with a config.json to import."""
    path = tmp_path_factory.mktemp("readme")
    (path / "search_spaces").symlink_to(ROOT / "search_spaces")
    (path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256,'
        ' "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,'
        ' "max_position_embeddings": 2048, "tie_word_embeddings": false}'
    )
    return path


def environment() -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"], "PYTHONPATH": str(ROOT)}


COMMANDS = [block for kind, block in BLOCKS if kind == "bash" and INSTALLS not in block]
PROGRAMS = [block for kind, block in BLOCKS if kind == "python"]
SPACES = [block for kind, block in BLOCKS if kind == "yaml"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("block", COMMANDS, ids=[b.splitlines()[-1][:40] for b in COMMANDS])
def test_commands(block, folder):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("block", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs(block, folder):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", SPACES, ids=range(len(SPACES)))
def test_spaces(block, tmp_path):
    from dse.space.compile import compile_space
    from dse.space.load import load_space

    (tmp_path / "space.yaml").write_text(block)
    assert compile_space(load_space(tmp_path / "space.yaml")).legal > 0


def test_the_two_commands_stand_between_their_markers():
    for name in ("run", "test"):
        block = re.search(rf"<!-- command: {name} -->\n```bash\n(.+?)\n```\n<!-- end -->", TEXT, re.S)
        assert block is not None
        assert block.group(1).startswith(INSTALLS)
        assert "\n" not in block.group(1)

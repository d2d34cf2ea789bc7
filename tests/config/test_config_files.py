"""Config files as people write them: what is read, and the line of what is not."""

import json

import pytest

from camopd_jax.config import TrainConfig
from camopd_jax.config.build import with_fields
from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.identity import to_json
from camopd_jax.config.python_file import read_python
from camopd_jax.config.yaml_file import read_yaml
from camopd_jax.errors import UserError

FIELDS = {
    "general_model": "g",
    "specialised_model": "s",
    "branches": {name: {"prompts": {"source": "x.jsonl"}} for name in ("recovery", "review")},
    "optimizer": {"learning_rate": 1e-6},
}


@pytest.fixture
def file(tmp_path):
    """file(NAME, TEXT) -> the path of a new file."""

    def write(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_json_and_the_config_of_an_earlier_run(file):
    written = file("c.json", json.dumps(FIELDS, indent="\t"))
    assert read_yaml(written) == FIELDS
    config = from_config_dict(TrainConfig, with_fields(TrainConfig, FIELDS))
    stored = file("config.json", json.dumps({"kind": "TrainConfig", "config": to_json(config)}))
    assert from_config_dict(TrainConfig, with_fields(TrainConfig, read_yaml(stored))) == config


def test_yaml_with_anchors_merges_and_a_byte_order_mark(file):
    text = "a: &one {x: 1, y: 2}\nb: {<<: *one, y: 3}\nc: *one\n"
    assert read_yaml(file("c.yaml", b"\xef\xbb\xbf" + text.encode())) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    "text, says",
    [
        ("steps: 1\nseed: 2\nsteps: 7\n", ":3: steps is also given in line 1; remove one of them"),
        ("branches:\n  a: {scale: 1}\n  b: 1\n  a: 2\n", ":4: a is also given in line 2"),
        ("evaluation:\n  benchmarks:\n    - {name: a, name: b}\n", ":3: name is also given in line 3"),
        (
            "optimizer.learning_rate: 1\n",
            ":1: optimizer.learning_rate has to be in blocks, as in `optimizer: {learning",
        ),
        ("optimizer: {1: 2}\n", ":1: '1' is not a name"),
        ("? [a, b]\n: 1\n", "is not a name"),
        ("method: &a {schedule: *a}\n", ":1: an alias (*) is inside of what it stands for"),
        ("optimizer:\n\tlearning_rate: 1\n", ":2: not YAML (found character '\\t'"),
        ("# nothing\n", ": give the fields of a config as `name: value`"),
        ("steps: 1\n---\nsteps: 2\n", ":2: not YAML"),
        ("# caf\xe9\n".encode("latin-1"), "not YAML ('utf-8'"),
    ],
)
def test_mistakes_in_yaml_are_named_by_their_line(file, text, says):
    path = file("c.yaml", text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(error.value).startswith(str(path)) and says in str(error.value)


START = "from camopd_jax.config import TrainConfig, default\ndef get_config():\n    config = default(TrainConfig)\n"


@pytest.mark.parametrize(
    "text, says",
    [
        ("def get_config(:\n", ":1: the config file fails: SyntaxError"),
        ("import no_such_package\n", ":1: the config file fails: ModuleNotFoundError"),
        ("steps = 1\n", ": no function get_config()"),
        (START, ": get_config() returns NoneType"),
        ("def get_config():\n    return {}\n", ": get_config() returns dict"),
        (START + "    config.stps = 3\n    return config\n", "config.stps is not a field; did you mean steps?"),
        (
            START + "    config.steps = 'many'\n",
            ":4: the config file fails: TypeError: Could not override",
        ),
        (START + "    config.branches.recovry.steps = 1\n", ":4: the config file fails: AttributeError"),
        (START + "    return 1 / 0\n", ":4: the config file fails: ZeroDivisionError"),
        (START + "    open('/no/such/file')\n", ":4: the config file fails: FileNotFoundError"),
        ("import json\njson.loads('{')\n", ":2: the config file fails: JSONDecodeError"),
        ("raise SystemExit('bye')\n", ":1: the config file fails: SystemExit: bye"),
    ],
)
def test_mistakes_in_python_are_named_by_their_line(file, text, says):
    path = file("c.py", text)
    with pytest.raises(UserError) as error:
        from_config_dict(TrainConfig, read_python(str(path)))
    assert says in str(error.value)
    assert "Traceback" not in str(error.value)


def test_an_argument_after_a_colon_and_files_that_are_none(file, tmp_path):
    path = file("c.py", START.replace("()", "(name)", 1) + "    config.general_model = name\n    return config\n")
    assert read_python(f"{path}:mine").general_model == "mine"
    with pytest.raises(UserError, match="no config file .*none.py; give one"):
        read_python(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match=r"c\.toml is no config file; give one whose name ends with \.py, \.yaml or"):
        read_python(str(file("c.toml", "steps = 1\n")))

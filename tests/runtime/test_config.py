"""Typed configuration: what is accepted, what is refused and how the refusal reads."""

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest

from vtp_diffusion.runtime.config import (
    Settings,
    build_config,
    config_to_dict,
    flatten_config,
    load_config,
    parse_config,
    save_config,
    setting,
    setting_differences,
)
from vtp_diffusion.training.config import TrainingConfig


@dataclass(kw_only=True)
class Inner:
    width: int = field(default=8, metadata={"help": "channels"})
    ratios: tuple[float, float] = (1.0, 2.0)
    name: str = "plain"


@dataclass(kw_only=True)
class Outer:
    output: str
    rate: float = 1e-3
    share: float | None = None
    precision: Literal["no", "bf16"] = "no"
    limit: int | None = None
    keep: bool | None = None
    labels: list[int | str] = field(default_factory=list)
    fast: bool = False
    inner: Inner = field(default_factory=Inner)


@dataclass(kw_only=True)
class Needy:
    inner: Outer


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("key", ["limit", "inner.width", "labels"])
def test_integers_that_nothing_can_hold_are_refused_in_one_line(key, tmp_path):
    with pytest.raises(ValueError, match=f"{key}.* is .9999.* of at most 4611686018427387904 in size") as refused:
        parse_config(Outer, ["--output", "x", f"--{key}", "9" * 400])
    assert len(str(refused.value)) < 600
    with pytest.raises(ValueError, match="cannot be read as YAML: 0xffff.* of 9002 characters is too long"):
        parse_config(Outer, ["--config", write(tmp_path, "limit: 0x" + "f" * 9000)])


def test_a_file_that_is_nested_too_deeply_is_named(tmp_path):
    with pytest.raises(ValueError, match="config.yaml cannot be read as YAML: its values are nested too deeply"):
        parse_config(Outer, ["--config", write(tmp_path, "labels: " + "[" * 20_000)])


def test_defaults_then_file_then_command_line(tmp_path):
    path = write(tmp_path, "output: here\nrate: 2e-4\ninner:\n  width: 16\n  ratios: [1, 3]\n")
    config = parse_config(Outer, ["--config", path, "--inner.width", "32", "--labels", "3", "cat"])
    assert config == Outer(
        output="here", rate=2e-4, labels=[3, "cat"], inner=Inner(width=32, ratios=(1.0, 3.0), name="plain")
    )


def test_yaml_words_and_numbers_are_not_reinterpreted(tmp_path):
    """YAML 1.1 would read no as False and 1e-3 as text."""
    config = parse_config(Outer, ["--config", write(tmp_path, "output: on\nprecision: no\nrate: 1e-3\n")])
    assert (config.output, config.precision, config.rate) == ("on", "no", 1e-3)


def test_command_line_values_follow_the_annotation():
    words = ["--output=x", "--rate", "-0.01", "--limit", "none", "--fast", "--keep", "false"]
    config = parse_config(Outer, [*words, "--inner.ratios", "1", "0.5", "--inner.name", "12", "--precision", "bf16"])
    assert (config.rate, config.limit, config.fast, config.keep) == (-0.01, None, True, False)
    assert config.inner == Inner(ratios=(1.0, 0.5), name="12") and config.precision == "bf16"


def test_option_names_may_be_written_with_dashes():
    @dataclass
    class Config:
        max_steps: int = 1

    assert (
        parse_config(Config, ["--max-steps=5"]).max_steps == parse_config(Config, ["--max_steps", "5"]).max_steps == 5
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\nrtae: 1\n", r"config.yaml: unknown key rtae; did you mean rate\?"),
        ("output: x\ninner: {widht: 1}\n", r"unknown key inner.widht; did you mean width\?"),
        ("output: x\nzzzz: 1\n", r"unknown key zzzz \(known keys: output, rate"),
        ("output: x\nrate: fast\n", "rate is 'fast', expected float"),
        ("output: x\nrate: .nan\n", "config.yaml: rate is nan, expected a finite number$"),
        ("output: x\nshare: -.inf\n", "share is -inf, expected a finite number or none$"),
        ("output: x\ninner: {ratios: [1, .inf]}\n", r"inner.ratios\[1\] is inf, expected a finite number$"),
        ("output: x\nlimit: .nan\n", "limit is nan, expected int or none"),
        ("output: x\nlimit: 1.5\n", "limit is 1.5, expected int or none"),
        ("output: x\nlimit: true\n", "limit is True, expected int or none"),
        ("output: x\nfast: 1\n", "fast is 1, expected bool"),
        ("output: 3\n", "output is 3, expected str"),
        ("output: x\nprecision: fp8\n", "precision is 'fp8', expected one of no, bf16"),
        ("output: x\nlabels: cat\n", "labels is 'cat', expected list of int or str"),
        ("output: x\nlabels: [1.5]\n", r"labels\[0\] is 1.5"),
        ("output: x\ninner: {ratios: [1]}\n", "ratios is .*, expected list of 2: float, float"),
        ("output: x\ninner: 3\n", "inner is 3, expected a section with some of width, ratios, name"),
        ("rate: 1.0\n", "no value for output"),
        ("output: x\nrate: 1.0\nrate: 2.0\n", "'rate' is given twice"),
        ("- 1\n", "must hold a mapping"),
        ("a: [1\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_config(Outer, ["--config", write(tmp_path, text)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ouptut", "x"], r"unknown option --ouptut; did you mean --output\?"),
        (["--output", "x", "--rate", "fast"], "--rate is 'fast', expected float"),
        (["--output", "x", "--rate", "1e999"], "--rate is inf, expected a finite number$"),
        (["--output", "x", "--inner.ratios", "nan", "1"], r"--inner.ratios\[0\] is nan, expected a finite number$"),
        (["--output", "x", "--share", "nan"], "--share is nan, expected a finite number or none$"),
        (["--output", "x", "--inner.width", "1.5"], "--inner.width is '1.5', expected int"),
        (["--rate", "1"], "no value for output"),
        (["--output", "x", "--labels", "1", "--labels", "2"], "--labels is given twice, expected once with all its"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(words, message):
    with pytest.raises(ValueError, match=message):
        parse_config(Outer, words)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse_config(Outer, ["--config", "nowhere.yaml"])


def test_a_required_key_of_an_unmentioned_section_is_named():
    with pytest.raises(ValueError, match="no value for inner.output"):
        parse_config(Needy, [])
    assert parse_config(Needy, ["--inner.output", "x"]).inner.output == "x"


def test_saved_configurations_read_back_equal(tmp_path):
    config = Outer(output="no", rate=1e-5, limit=3, labels=["1", 2, "null"], inner=Inner(ratios=(0.5, 1e-7)))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Outer, tmp_path / "saved.yaml") == config
    assert flatten_config(config_to_dict(config))["inner.ratios"] == [0.5, 1e-7]


def test_help_says_what_fields_mean(capsys):
    with pytest.raises(SystemExit):
        parse_config(Outer, ["--help"], "what it does")
    text = capsys.readouterr().out
    assert (
        "what it does" in text and "--inner.width" in text and "channels [int; default: 8]" in " ".join(text.split())
    )


@dataclass(kw_only=True)
class Bounded(Settings):
    share: float = setting(0.5, "in [0, 1)", at_least=0, below=1)
    rate: float | None = setting(None, "positive", above=0)
    sizes: list[int] = setting(default_factory=list, help="positive", at_least=1)
    shift: float | Literal["dimensions"] = setting("dimensions", "positive or a word", above=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.0}, r"share is 1.0, expected a number in \[0, 1\)"),
        ({"share": -0.1}, r"share is -0.1, expected a number in \[0, 1\)"),
        ({"rate": 0.0}, "rate is 0.0, expected a positive number"),
        ({"rate": math.inf}, "rate is inf, expected"),
        ({"sizes": [3, 0]}, r"sizes is \[3, 0\], expected a positive number"),
        ({"shift": -1.0}, "shift is -1.0, expected a positive number"),
    ],
)
def test_numbers_outside_their_bounds_are_refused_wherever_a_configuration_is_made(values, message):
    with pytest.raises(ValueError, match=message):
        Bounded(**values)
    if math.inf not in values.values():
        with pytest.raises(ValueError, match=message):
            build_config(Bounded, values, "here")
    assert Bounded(share=0, rate=1e-9, sizes=[1], shift="dimensions").rate == 1e-9


def test_yaml_numbers_are_those_of_yaml_1_2(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output: 12:30\nlimit: 010\nlabels: [0o17, 0x1F, -7, 1_000]\n")
    found = parse_config(Outer, ["--config", str(file)])
    assert (found.output, found.limit, found.labels) == ("12:30", 10, [15, 31, -7, "1_000"])


def test_negative_numbers_are_values_and_names_may_have_dashes():
    found = parse_config(
        Outer, ["--output", "y", "--output", "x", "--rate", "-5e-1", "--labels", "-3", "cat", "--inner.width=4"]
    )
    assert (found.rate, found.labels, found.inner.width) == (-0.5, [-3, "cat"], 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1"], r"unknown option --lr; did you mean --learning_rate\?"),
        (["--warmup", "1"], r"unknown option --warmup; did you mean --lr_warmup_steps\?"),
        (["--leaning-rate", "1"], r"unknown option --leaning_rate; did you mean --learning_rate\?"),
        (["--seed"], "--seed is given without a value, expected int"),
        (["--seed", "1", "2"], "--seed is 1 2, expected int"),
        (["runs/x"], "'runs/x' follows no option"),
    ],
)
def test_a_refused_command_line_says_what_was_meant(words, message):
    with pytest.raises(ValueError, match=message):
        parse_config(TrainingConfig, words)


def test_a_configuration_is_found_by_its_name_and_listed_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text("# A small one, for\n# a laptop. Not run.\noutput: x\n")
    shipped = sorted((tmp_path / "configs").glob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    for word in ("small", "small.yaml", "configs/small.yaml"):
        assert parse_config(Outer, ["--config", word], None, shipped).output == "x"
    (tmp_path / "small").write_text("output: mine\n")
    assert parse_config(Outer, ["--config", "small"], None, shipped).output == "mine", "a file that is there"
    with pytest.raises(FileNotFoundError, match="large does not exist.*expected a file or one of small"):
        parse_config(Outer, ["--config", "large"], None, shipped)
    with pytest.raises(SystemExit):
        parse_config(Outer, ["--help"], "What it does.\n\nMore.", shipped)
    printed = " ".join(capsys.readouterr().out.split())
    assert "What it does. configurations (--config NAME): small A small one More. options:" in printed
    assert "YAML file of options, or a configuration's name; the command line wins" in printed


def test_help_has_bounds_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainingConfig, ["--help"], "What it does.")
    printed = " ".join(capsys.readouterr().out.split())
    assert "What it does." in printed and "[float, a number in [0, 1); default: 0.9999]" in printed
    assert "YAML file of options; the command line wins" in printed


def test_settings_that_differ_are_named_with_both_values():
    there = {"steps": 3, "sizes": [1, 2], "data": {"path": "a", "shuffle": True}}
    now = {"steps": 4, "sizes": (1, 2), "data": {"path": "a"}, "rate": None}
    assert setting_differences(there, now) == [
        "  data.shuffle: True there, (absent) now",
        "  rate: (absent) there, None now",
        "  steps: 3 there, 4 now",
    ]
    assert setting_differences(there, there) == []


def test_an_empty_configuration_is_refused(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ValueError, match="empty.yaml is empty, expected settings"):
        parse_config(TrainingConfig, ["--config", str(tmp_path / "empty.yaml"), "--output_dir", "x"], "")

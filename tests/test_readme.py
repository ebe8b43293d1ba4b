"""What README and docs/ tell is so: options exist, commands take their arguments, links lead somewhere."""

import importlib.util
import re
import shlex

import pytest
import yaml

from tests.conftest import ROOT, control_options, plain_options, tiny_options
from tests.helpers import GAN, run_python
from tlw_basicsr import __version__, cli
from tlw_basicsr.engine.options import check_options
from tlw_basicsr.util.yaml_options import load_yaml

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in PAGES}
BLOCKS = [(name, block) for name, text in TEXTS.items() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def update(target, source):
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict) and "type" not in value:
            update(target[key], value)
        else:
            target[key] = value


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=lambda b: b.splitlines()[0][:40])
def test_the_options_of_every_example_exist(photographs, name, block):
    example = load_yaml(block, name)
    if "plugins" in example:
        assert example["plugins"] == ["hat.archs", "hat.models"]  # the HAT plugin's modules, not installed here
        return
    opt = tiny_options(photographs, **(GAN if example.get("base_model") == "ESRGANModel" else {}))
    if example.get("model_type") == "UncertaintyModel":
        opt = plain_options(photographs)
    if "weights" in example.get("train", {}).get("pixel_opt", {}):
        opt = control_options(photographs, "random")
    update(opt, example)
    check_options(opt, True)


def commands():
    for name, text in TEXTS.items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "tlw":
                    yield name, words[1:]


def test_every_command_has_the_arguments_that_are_told(capsys, monkeypatch):
    known, told = {}, list(commands())
    assert len(told) > 15
    for name, (command, *arguments) in told:
        if command not in known:
            with pytest.raises(SystemExit):
                cli.run_command(command, ["--help"])
            known[command] = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
        for word in arguments:
            assert not word.startswith("-") or word in known[command], f"{name}: tlw {command} {word}"


def anchors(text):
    """Of its headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere_and_every_file_that_is_named_exists(name):
    for path in set(re.findall(r"(?:scripts|tlw_basicsr|examples|tests)/[\w/.]+\.(?:py|sh|yml)", TEXTS[name])):
        assert (ROOT / path).is_file() or "NAME" in path, path
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), target


def test_the_readme_is_read_in_one_go_and_the_version_is_one():
    assert len(TEXTS["README.md"].splitlines()) <= 170
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_the_workflows_run_is_here(path):
    content = yaml.safe_load(path.read_text("utf-8"))
    for job in content.get("jobs", {}).values():
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            for file in re.findall(r"scripts/\w+\.(?:sh|py)", step.get("run", "")):
                assert (ROOT / file).is_file()


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install '.[docs]'")
def test_the_documentation_builds_strictly(tmp_path):
    run_python(ROOT, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site")
    api = (tmp_path / "site/api.html").read_text("utf-8")
    assert "num_samples" in api and "weight_criterion_loss" in api
    assert "::</p>" not in api and "<p>::" not in api and "<p>tlw = TLW" not in api
    for page in ("index", "method"):
        formulas = re.findall(r'class="arithmatex">(.{5})', (tmp_path / f"site/{page}.html").read_text("utf-8"))
        assert set(formulas) == {"<math"}

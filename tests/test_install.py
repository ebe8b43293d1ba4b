"""What an environment needs: the set-up script and ``tlw-setup``, the core without BasicSR, and BasicSR when it comes."""

import ast
import os
import subprocess

import pytest

import tlw_setup
from tests.conftest import ROOT
from tests.helpers import run_python
from tlw_basicsr import PLACES
from tlw_basicsr.plugin import MISSING

HIDE = """
import sys
from importlib.machinery import PathFinder

real = PathFinder.find_spec
hidden = ("basicsr", "cv2", "lmdb", "spandrel", "yaml")
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name in hidden else real(name, *rest))
"""


LATER = """
import sys, numpy as np
import tlw_basicsr, basicsr.data.degradations as degradations
late = {"torch._dynamo", "scipy.stats"}
assert not late & {*sys.modules}, late & {*sys.modules}
points, covariance = np.array([[0.0, 0.5], [1.0, -1.0]]), np.eye(2)
found = degradations.cdf2(covariance, points)
from scipy.stats import multivariate_normal
assert (found == multivariate_normal([0, 0], covariance).cdf(points)).all()
import torch, torchvision
torch.use_deterministic_algorithms(True)
boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, (2, 2)).eq(1).all()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""


def test_what_few_functions_need_is_imported_when_they_are_called():
    run_python(ROOT, "-c", LATER)


TRAIN = """
import resource, torch
cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
start, before = cpu(), set(sys.modules)
import tlw_basicsr
from tlw_basicsr import TLW, SSIMDistance
seconds, more = cpu() - start, set(sys.modules) - before
assert seconds < 0.5 and len(more) < 30, (seconds, more)
net = torch.nn.Conv2d(3, 3, 3, padding=1)
adam = torch.optim.Adam(net.parameters(), 1e-2)
tlw, gt = TLW(SSIMDistance(5)), torch.rand(2, 3, 24, 24)
losses = []
for _ in range(5):
    loss = tlw(net(gt), gt)
    adam.zero_grad(); loss.backward(); adam.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
import importlib.util
assert importlib.util.find_spec("basicsr") is None
from tlw_basicsr import TLWModel
"""


def test_the_core_trains_without_basicsr_and_the_rest_names_what_to_run():
    done = run_python(ROOT, "-c", HIDE + TRAIN, code=1)
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {MISSING}", done.stderr
    done = run_python(ROOT, "-c", HIDE + "from tlw_basicsr.cli import main; main(['train', 'x.yml'])", code=2)
    assert done.stderr == f"error: {MISSING}\n"


def test_add_needs_no_basicsr(tmp_path):
    (tmp_path / "a.yml").write_text(
        "name: a\nmodel_type: SRModel\nnetwork_g: {type: EDSR}\n"
        "train: {optim_g: {type: Adam}, total_iter: 9, pixel_opt: {type: L1Loss}}\n"
    )
    hide = HIDE.replace(', "yaml")', ")")
    done = run_python(tmp_path, "-c", hide + "from tlw_basicsr.cli import main; main(['add', 'a.yml', 'b.yml'])")
    assert done.stdout.startswith("b.yml: TLW added")


def test_editors_see_the_names_that_can_be_imported():
    tree = ast.parse((ROOT / "tlw_basicsr/__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.asname) for node in block.body for alias in node.names}
    assert seen == {(f"tlw_basicsr.{place}", name) for place, names in PLACES.items() for name in names.split()}


@pytest.mark.parametrize(
    "first",
    ["import tlw_basicsr, basicsr", "from tlw_basicsr.networks import load_network", "from tlw_basicsr import TLWLoss"],
)
def test_whoever_imports_basicsr_gets_the_plugin(first):
    program = (
        f"{first}\nimport basicsr.metrics\nfrom basicsr.utils import registry as r\n"
        "assert 'TLWModel' in r.MODEL_REGISTRY and 'TLWHAT' in r.ARCH_REGISTRY and 'TLWLoss' in r.LOSS_REGISTRY\n"
        "assert 'tlw_lpips' in r.METRIC_REGISTRY and 'BicubicSRDataset' in r.DATASET_REGISTRY\n"
        "assert basicsr.metrics.calculate_metric.__module__.startswith('tlw_basicsr')\n"
    )
    run_python(ROOT, "-c", program)


CONVERT = "from tlw_basicsr.cli import main; main(['convert'])"
BROKEN = {
    "import no_such_thing": "No module named 'no_such_thing'; run: tlw-setup",
    "import basicsr.archs": "No module named 'basicsr.archs'",
    "1 / 0": "ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize(("content", "message"), BROKEN.items())
def test_a_basicsr_that_is_broken_is_one_line(tmp_path, content, message):
    place = tmp_path / "basicsr/__init__.py"
    place.parent.mkdir()
    place.write_text(content)
    program = "import tlw_basicsr\ntry:\n    import basicsr\nexcept ImportError as error:\n    print(error)\n" + CONVERT
    done = run_python(tmp_path, "-c", program, code=2)  # Python looks into its folder first
    line = f"{place} could not be imported: {message}\n"
    assert (done.stdout, done.stderr) == (line, f"error: {line}")


def test_a_folder_of_its_name_is_not_basicsr(tmp_path):
    (tmp_path / "basicsr/utils").mkdir(parents=True)
    hide = HIDE.replace("None if name in hidden", "real(name, [str(sys.path[1])]) if name in hidden")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_python(tmp_path, "-c", hide + CONVERT, code=2, PYTHONPATH=paths)
    assert done.stderr == f"error: {MISSING}\n"


@pytest.mark.parametrize("python_name", ["/bin/false", "no-such-python"])
def test_a_python_that_cannot_be_used_is_an_error_and_not_another_python(tmp_path, python_name):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup_env.sh").write_bytes((ROOT / "scripts/setup_env.sh").read_bytes())
    command, env = ["bash", "-c", "source scripts/setup_env.sh ''"], os.environ | {"PYTHON": python_name}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: PYTHON={python_name} is not a Python of 3.10 or later that can make environments\n"
    assert not (tmp_path / ".venv").exists()


def test_exec_within_a_function_gives_names_to_locals_as_it_did():
    """What BasicSR's setup.py does to learn its version."""
    program = tlw_setup.OLD_EXEC + (
        "\ndef version():\n    exec(compile('x = 5', 'file', 'exec'))\n    return locals()['x']\n"
        "space = {}\nexec('y = 6', space)\nexec('z = 7', {}, space)\n"
        "assert version() == 5 and space['y'] == 6 and space['z'] == 7\n"
    )
    run_python(ROOT, "-c", program)


def test_setup_installs_what_is_missing_and_leaves_a_basicsr_alone(capsys, monkeypatch):
    wanted = ["torch>=2; extra == 'basicsr'", "No_Such.thing>=1; extra == 'basicsr'", "neither; extra == 'docs'"]
    monkeypatch.setattr(tlw_setup, "requires", lambda _: wanted)
    installed = []
    monkeypatch.setattr(tlw_setup, "install", lambda *names, **_: installed.extend(names))
    tlw_setup.main()
    assert installed == ["No_Such.thing>=1"]
    assert capsys.readouterr().out.splitlines()[-1] == "BasicSR is installed already"


def test_what_the_core_needs_is_in_the_whole_list():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(project["dependencies"]) <= set((ROOT / "requirements.txt").read_text("utf-8").split())

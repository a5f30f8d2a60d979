"The package as its users get it."
import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "IPython": "ipython", "skimage": "scikit-image"}  # where the names differ
CALLED = {"ipykernel"}  # needed without being imported: papermill starts it


def names(requirements): return {re.match(r"[\w.-]+", r)[0].lower() for r in requirements}


def settings(key):
    config = configparser.ConfigParser()
    config.read(ROOT/"settings.ini")
    return config["DEFAULT"][key].split()


def imported():
    "Distributions that the package and the experiments import."
    import nbformat
    sources = [p.read_text() for p in (ROOT/"pkg/whatmatters").rglob("*.py")]
    sources += [c.source for p in (ROOT/"nbs/experiments").glob("*.ipynb") for c in nbformat.read(p, 4).cells if c.cell_type == "code"]
    found = set()
    for node in (n for s in sources for n in ast.walk(ast.parse(s))):
        if isinstance(node, ast.Import): found |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0: found.add(node.module.split(".")[0])
    return {DISTRIBUTION.get(n, n) for n in found - set(sys.stdlib_module_names) - {"whatmatters"}}


def test_settings_name_what_is_imported():
    assert names(settings("requirements")) == imported() | CALLED


def test_environment_is_that_of_settings():
    import yaml
    dependencies = yaml.safe_load((ROOT/"environment.yml").read_text())["dependencies"]
    pip = next(d["pip"] for d in dependencies if isinstance(d, dict))
    assert sorted(pip) == sorted([*settings("requirements"), *settings("dev_requirements"), "-e ./pkg"])


def test_constraints_pin_every_requirement():
    pins = dict(line.lower().split("==") for line in (ROOT/"constraints.txt").read_text().split())
    assert names(settings("requirements") + settings("dev_requirements")) <= set(pins)
    assert pins["torch"] == "2.13.0"


def test_readme_commands_are_those_of_ci():
    readme, script = (ROOT/"README.md").read_text(), (ROOT/".ci/run").read_text()
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"] and readme.index("make run") < readme.index("make test") < readme.index("## ")
    assert "bash .ci/run" in (ROOT/".github/workflows/test.yml").read_text()


def loaded(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded("import whatmatters") & {"torch", "transformers", "matplotlib", "numpy", "papermill", "pandas"}
    assert not loaded("import whatmatters.attribution.gradients, whatmatters.evaluation.faithfulness") & {"transformers", "matplotlib", "papermill", "pandas"}
    assert not loaded("import whatmatters.core.cli") & {"torch", "transformers", "matplotlib", "papermill"}


def test_a_clean_environment_runs_the_wheel(tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # on which pip would find the checkout and install nothing
    run = lambda *command, **options: subprocess.run(command, check=True, capture_output=True, text=True, env=clean, **options)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT/"pkg")
    wheel, = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path/"venv")
    python, pins = tmp_path/"venv/bin/python", ROOT/"constraints.txt"
    torch = next(line for line in pins.read_text().split() if line.startswith("torch=="))
    install = lambda *what: run(python, "-m", "pip", "install", "--quiet", "--no-compile", *what)  # what is imported is compiled then: the rest need not be
    install(torch)
    install("--constraint", pins, wheel)
    installed = run(python, "-m", "pip", "list", "--format", "freeze").stdout.lower()
    assert "whatmatters==" in installed and not any(f"\n{n}==" in installed for n in ("nbdev", "fastcore", "pytest", "jupyterlab", "captum"))
    empty = tmp_path/"empty"
    empty.mkdir()
    said = run(tmp_path/"venv/bin/whatmatters", "run", "roar", "--preset", "smoke", cwd=empty).stdout
    assert "report:   runs/report.html" in said and (empty/"runs/report.html").exists()
    again = run(tmp_path/"venv/bin/whatmatters", "run", "roar", "--preset", "smoke", cwd=empty).stdout
    assert "finished before" in again

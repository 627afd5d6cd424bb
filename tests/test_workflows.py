"""The workflows call targets of the Makefile, and test the versions that the metadata names."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.name: path for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def jobs_of(name):
    return yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))["jobs"]


def steps_of(name):
    return [step for job in jobs_of(name).values() for step in job.get("steps", [])]


def targets():
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)[1]
    return {
        name for name in phony.replace("\\", "").split() if re.search(f"^{name}:", MAKEFILE, re.MULTILINE)
    }


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("test.yml", {"test", "test-torch", "test-matrix", "test-deepspeed", "test-ecosystem", "test-hub"}),
        ("docs.yml", {"docs"}),
        ("dist.yml", {"dist"}),
        ("release.yml", set()),  # calls dist.yml
    ],
)
def test_workflows_call_targets_of_the_makefile(name, called):
    commands = []
    for job in jobs_of(name).values():
        for step in job.get("steps", []):
            for target in job.get("strategy", {}).get("matrix", {}).get("target", [""]):
                commands.append(step.get("run", "").replace("${{ matrix.target }}", target))
    found = {target for command in commands for target in re.findall(r"\bmake ([\w-]+)", command)}
    assert found == called
    assert found <= targets()


def test_every_workflow_is_tested():
    assert WORKFLOWS.keys() == {"test.yml", "docs.yml", "dist.yml", "release.yml"}


def test_the_versions_of_python_and_torch_are_those_of_the_metadata():
    jobs = jobs_of("test.yml")
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert jobs["python"]["strategy"]["matrix"]["python"] == versions
    oldest = re.search(r'dependencies = \["torch>=([\d.]+)"\]', PYPROJECT)[1]
    assert jobs["torch"]["strategy"]["matrix"]["torch"] == [f"{oldest}.0", "newest"]
    used = {
        str(step["with"]["python-version"])
        for name in WORKFLOWS
        for step in steps_of(name)
        if "setup-python" in step.get("uses", "")
    }
    assert used - {"${{ matrix.python }}"} <= set(versions)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rights_are_few_and_actions_are_pinned(name):
    workflow = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job.get("permissions", {"id-token": "write"}) == {"id-token": "write"}
    for step in steps_of(name):
        assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])


def test_only_the_release_may_upload():
    assert [name for name, path in WORKFLOWS.items() if "id-token" in path.read_text(encoding="utf-8")] == [
        "release.yml"
    ]
    release = yaml.safe_load(WORKFLOWS["release.yml"].read_text(encoding="utf-8"))
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    upload = release["jobs"]["upload"]
    assert (upload["needs"], upload["environment"]) == ("dist", "pypi")
    assert release["jobs"]["dist"]["uses"] == "./.github/workflows/dist.yml"


def test_the_bug_report_asks_for_the_environment():
    forms = {
        path.name: yaml.safe_load(path.read_text())
        for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
    }
    forms.pop("config.yml")
    assert forms.keys() == {"bug_report.yml", "feature_request.yml", "new_rule.yml"}
    for form in forms.values():
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
    required = [
        field["attributes"]["label"]
        for field in forms["bug_report.yml"]["body"]
        if field.get("validations", {}).get("required")
    ]
    assert "Output of `python -m sago`" in required

"""The workflows call targets of the Makefile, and test the versions that the metadata names."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.name: path for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def workflow_of(name):
    """The workflow, and its triggers as `on`, a key that YAML 1.1 reads as true."""
    workflow = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    return {"on": workflow.pop(True), **workflow}


def jobs_of(name):
    return workflow_of(name)["jobs"]


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
        ("release.yml", set()),  # calls test.yml and dist.yml
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


def test_the_script_of_other_services_calls_a_target_of_the_makefile():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.findall(r"^make (.*)$", script, re.MULTILINE) == ["test"]


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
    assert workflow_of(name)["permissions"] == {"contents": "read"}
    more = {job: found["permissions"] for job, found in jobs_of(name).items() if "permissions" in found}
    assert more == {
        "release.yml": {"upload": {"id-token": "write"}},
        "docs.yml": {"deploy": {"id-token": "write", "pages": "write"}},
    }.get(name, {})
    for step in steps_of(name):
        assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])


def test_a_release_is_uploaded_after_all_tests_and_those_of_the_sdist():
    release = workflow_of("release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    upload = release["jobs"]["upload"]
    assert (upload["needs"], upload["environment"]) == (["test", "dist"], "pypi")
    for name in upload["needs"]:
        assert release["jobs"][name] == {"uses": f"./.github/workflows/{name}.yml"}
        assert "workflow_call" in workflow_of(f"{name}.yml")["on"]
    commands = [step["run"] for step in steps_of("dist.yml") if "run" in step]
    assert commands == ["make dist TESTS=tests PYTHON=python3.11"]


@pytest.mark.parametrize(
    ("tag", "heading", "allowed"),
    [
        ("v0.2.0", "## [0.2.0] - 2030-01-31", True),
        ("v0.2.0", "## [Unreleased]", False),
        ("v0.2.0", "## [0.2.0]", False),
        ("v0.2.1", "## [0.2.1] - 2030-01-31", False),  # the sdist is of version 0.2.0
    ],
)
def test_a_tag_is_uploaded_if_the_version_and_the_changelog_say_so(tag, heading, allowed, tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    (tmp_path / "dist").mkdir()
    with tarfile.open(tmp_path / "dist/sago_kernels-0.2.0.tar.gz", "w:gz") as sdist:
        sdist.add(tmp_path / "CHANGELOG.md", "sago_kernels-0.2.0/CHANGELOG.md")
    (command,) = [step["run"] for step in jobs_of("release.yml")["upload"]["steps"] if "run" in step]
    variables = {"PATH": os.environ["PATH"], "GITHUB_REF_NAME": tag}
    done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=variables, capture_output=True)
    assert (done.returncode == 0) is allowed


def test_a_push_to_main_deploys_the_site():
    docs = workflow_of("docs.yml")
    assert docs["on"].keys() == {"push", "pull_request", "workflow_dispatch"}
    assert docs["on"]["push"] == {"branches": ["main"]}
    build, deploy = docs["jobs"]["docs"], docs["jobs"]["deploy"]
    folder = re.search(r"sphinx .* (\S+)$", MAKEFILE, re.MULTILINE)[1]
    assert {"uses": "actions/upload-pages-artifact@v5", "with": {"path": f"{folder}/"}} in build["steps"]
    assert (deploy["needs"], deploy["if"]) == ("docs", "github.event_name == 'push'")
    assert deploy["environment"]["name"] == "github-pages"
    used = [step["uses"].partition("@")[0] for step in deploy["steps"]]
    assert used == ["actions/configure-pages", "actions/deploy-pages"]
    outputs = f"steps.{deploy['steps'][1]['id']}.outputs.page_url"
    assert deploy["environment"]["url"] == f"${{{{ {outputs} }}}}"


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

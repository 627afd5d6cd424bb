import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# A link of Markdown or HTML to a file of the repository, or code, which stays as it is.
LINK = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)"
    r"|(?P<start>\]\(|\b(?:href|src|srcset)=\")(?!https?:|mailto:)(?P<path>[^)\s\"]+)",
    re.DOTALL,
)


def value_of(name, file):
    return re.search(f'^{name} = "(.*)"$', (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)[1]


REPOSITORY = value_of("Repository", "pyproject.toml")
VERSION = value_of("__version__", "sago/__init__.py")


def absolute(link):
    """The link to the file at the tag of this version, where it also works on a package index."""
    if link["code"]:
        return link["code"]
    path = f"README.md{link['path']}" if link["path"].startswith("#") else link["path"]
    view = "raw" if path.endswith((".png", ".svg", ".gif", ".jpg")) else "blob"
    return f"{link['start']}{REPOSITORY}/{view}/v{VERSION}/{path}"


# The folder kernels/triton/ is imported as sago.kernels. `kernels` has no __init__.py and is in no
# distribution: transformers looks for the Hugging Face package of that name, and would import one found here.
setup(
    version=VERSION,
    packages=[*find_packages(include=["sago", "sago.*"]), "sago.kernels"],
    package_dir={"sago": "sago", "sago.kernels": "kernels/triton"},
    package_data={"sago": ["py.typed"]},
    long_description=LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)

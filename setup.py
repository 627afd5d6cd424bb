from setuptools import find_packages, setup

# The folder kernels/triton/ is imported as sago.kernels. `kernels` has no __init__.py and is in no
# distribution: transformers looks for the Hugging Face package of that name, and would import one found here.
setup(
    packages=[*find_packages(include=["sago", "sago.*"]), "sago.kernels"],
    package_dir={"sago": "sago", "sago.kernels": "kernels/triton"},
    package_data={"sago": ["py.typed"]},
)

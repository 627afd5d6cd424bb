from setuptools import setup

# The folder kernels/ is imported as sago.kernels: a top-level package named `kernels`
# would shadow the Hugging Face distribution of that name, which transformers imports.
setup(
    packages=["sago", "sago.integrations", "sago.kernels"],
    package_dir={"sago": "sago", "sago.kernels": "kernels"},
    package_data={"sago": ["py.typed"]},
)

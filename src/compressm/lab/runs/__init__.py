"""What ``compressm train`` runs: configuration, data, model, and the training loop on Accelerate."""

from importlib.util import find_spec

from compressm.errors import MissingExtraError

_NEEDED = {
    "accelerate": "accelerate",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
}
_missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
if _missing:
    raise MissingExtraError(f'training needs {", ".join(_missing)}: pip install "compressm[train]"')

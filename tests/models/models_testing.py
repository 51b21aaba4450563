"""What the tests of the models share."""
import importlib
import pkgutil

from cpool_vision import models

# By family, as its file declares them.
POSITIONS = {
    info.name: importlib.import_module(f'cpool_vision.models.{info.name}').FAMILY.positions
    for info in pkgutil.iter_modules(models.__path__) if not info.name.startswith('_')}

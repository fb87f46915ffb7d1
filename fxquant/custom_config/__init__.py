"""What ``prepare_fx``, ``convert_fx`` and ``fuse_fx`` are told beside the qconfigs.

::

    PrepareCustomConfig()
        .set_non_traceable_module_names(["decoder"])
        .set_standalone_module_class(Backbone, None, (x,), None, None)
        .set_preserved_attributes(["classes"])

The classes have the setters, attributes and dict forms of torch.ao's;
:func:`as_prepare_custom_config` and its like read torch.ao's objects and dicts.

==================  ==================================================
module              holds
==================  ==================================================
``prepare``         :class:`PrepareCustomConfig`
``convert``         :class:`ConvertCustomConfig`
``fuse``            :class:`FuseCustomConfig`
``standalone``      how a submodule is prepared on its own
``class_mapping``   which class a custom module becomes
``reading``         torch.ao's objects as dicts, and lists of one type
``text``            how the configs are printed
==================  ==================================================
"""

from __future__ import annotations

from fxquant.custom_config.class_mapping import ClassMapping, QuantType, as_quant_type
from fxquant.custom_config.convert import ConvertCustomConfig, as_convert_custom_config
from fxquant.custom_config.fuse import FuseCustomConfig, as_fuse_custom_config
from fxquant.custom_config.prepare import PrepareCustomConfig, as_prepare_custom_config
from fxquant.custom_config.standalone import StandaloneModuleConfigEntry

__all__ = [
    "ClassMapping",
    "ConvertCustomConfig",
    "FuseCustomConfig",
    "PrepareCustomConfig",
    "QuantType",
    "StandaloneModuleConfigEntry",
    "as_convert_custom_config",
    "as_fuse_custom_config",
    "as_prepare_custom_config",
    "as_quant_type",
]

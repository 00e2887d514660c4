"""What a Keras layer was made with: its weights, and its options, refused by name if nothing equals them."""

import torch


class Options:
    """A layer's configuration, whose refusals name the layer and the option."""

    def __init__(self, layer):
        self.layer, self.config = layer, layer.get_config()

    def __getitem__(self, name):
        return self.config[name]

    def error(self, why):
        return ValueError(f"layer {self.layer.name!r} ({type(self.layer).__name__}): {why}")

    def require(self, **values):
        """Refuses options that are there and have another value."""
        for name, value in values.items():
            if name in self.config and self.config[name] != value:
                raise self.error(f"{name}={self.config[name]!r} is not supported, only {value!r}")

    @property
    def channels_first(self):
        """Whether data_format says so."""
        return self.config["data_format"] == "channels_first"

    def weights(self, count):
        arrays = self.layer.get_weights()
        if len(arrays) != count:
            raise self.error(f"expected {count} weights, it has {len(arrays)}; is the model built?")
        return [torch.tensor(array) for array in arrays]


def set_(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)

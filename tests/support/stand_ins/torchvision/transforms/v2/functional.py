from torchvision import ANY


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return ANY

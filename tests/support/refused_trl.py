"""A TRL that computes its loss elsewhere: our trainer is refused before it reads the model."""

from importlib.metadata import version

try:
    from focalpo_plugins import FocalPOConfig, FocalPOTrainer

    FocalPOTrainer("no/such-model", args=FocalPOConfig("unused", use_cpu=True, bf16=False))
except RuntimeError as error:
    message = str(error)
    assert f"trl {version('trl')} " in message, message
    assert "as trl 0.29.0 to 1.16.0 do. Install one of these." in message, message
    print(f"refused: {message}")
else:
    raise SystemExit(f"trl {version('trl')} was accepted")

"""What the sections of every configuration share: strict, frozen, documented field by field."""

from collections.abc import Iterator, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Self

from laser_fast import needs_train

with needs_train():
    import tomli_w
    from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
    from pydantic import Field as Field

from laser_fast.config_errors import ConfigError, apply_override, explain, read_toml, reading

# A path or an id, in which ~ is the user's home.
UserPath = Annotated[str, AfterValidator(expanduser)]


class Section(BaseModel):
    """A part of a configuration, or a whole one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def parse(cls, data: dict[str, Any], *, source: str) -> Self:
        """Validate a nested dict; `source` opens the error message."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            with reading(source):  # a value may be nested too deeply to be shown
                raise ConfigError(f"{source}: {explain(error, all_keys(cls))}") from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file, apply `section.key=value` overrides and validate.

        Override values are TOML, or strings where they do not parse as TOML. A ConfigError names
        the key, the nearest valid name and what to do.
        """
        data = read_toml(path)
        for override in overrides:
            apply_override(data, override)
        return cls.parse(data, source=str(path))

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """What is wrong with keys that are right by themselves."""
        yield from ()


def dump_config(config: Section) -> str:
    """The resolved configuration as TOML; loaded again, it gives the same configuration."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def all_keys(kind: type[Section]) -> dict[str, str]:
    """Every dotted key with its documentation, in the order of the file."""
    keys: dict[str, str] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= {f"{name}.{key}": text for key, text in all_keys(field.annotation).items()}
        else:
            keys[name] = field.description or ""
    return keys

"""What every section of a recipe shares: strict keys, null as "not written", and the way back to plain values."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vlm.recipe import units
from vlm.recipe.errors import unknown


def problem(message: str, *at: str | int) -> PydanticCustomError:
    """A contradiction between keys; ``at`` leads from the section to the key that the message is about."""
    return PydanticCustomError("contradiction", "{message}", {"message": message, "at": at})


class Section(BaseModel):
    """A mapping with fixed keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        for key in data:
            if key not in fields:
                raise problem(unknown(str(key), fields), key)
        nullable = {name for name, field in fields.items() if type(None) in _alternatives(field.annotation)}
        return {key: value for key, value in data.items() if value is not None or key in nullable}

    def plain(self) -> dict[str, Any]:
        """The section as nested dicts and lists in the spelling of a recipe file, defaults included."""
        names = {name: field.alias or name for name, field in type(self).model_fields.items()}
        return {names[name]: _plain(value) for name, value in self}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", (annotation,))


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.plain()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], Method):
        # As a mapping, so that `mitigate.use=...` addresses it in a resolved recipe too.
        return value[0].plain()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class Method(Section):
    """A method by name, with its options as they were written; ``vlm.create`` makes the object.

    Options keep their text (``25%``, ``1`` and ``1.0`` differ) and their place in the file until the signature
    of the method says what they are.
    """

    use: Annotated[Any, BeforeValidator(lambda name: name if isinstance(name, str) else units.parse_str(name))]
    # Opaque to pydantic, which would copy the keys and lose their places.
    options: Any = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = {field.alias or name for name, field in cls.model_fields.items() if name != "options"}
        options = {key: value for key, value in data.items() if key not in own}
        return {key: value for key, value in data.items() if key in own} | {"options": options}

    @property
    def where(self) -> str:
        """The place in the file (or the override) that named the method; empty when made in Python."""
        return getattr(self.use, "where", "")

    @property
    def title(self) -> str:
        """A short name for tables: ``fastv 25%``, ``fastv average 192``."""
        keep = self.options.get("keep")
        words = [f"{meaning} {amount}" for meaning, amount in keep.items()] if isinstance(keep, Mapping) else [keep]
        return " ".join([str(self.use), *(str(word) for word in words if word is not None)])

    def plain(self) -> dict[str, Any]:
        """``{use, **options}``, as it was before it was read."""
        fields = super().plain()
        options = fields.pop("options")
        return {key: value for key, value in fields.items() if value is not None} | options

    def record(self) -> dict[str, Any]:
        """``plain`` with JSON's types, for records such as evaluation.json."""
        return units.natural(self.plain())

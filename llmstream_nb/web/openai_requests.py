"""What clients of OpenAI's API ask for, as the kit asks models for it. No I/O.

What can't be had here is refused by its field's name, and what would have no effect is passed over.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from llmstream_nb.llm.messages import Message
from llmstream_nb.web.admission import Invalid

Temperature = Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)]
Probability = Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)]
Tokens = Annotated[int | None, Field(ge=1, le=10_000_000)]
Items = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1_000)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None


class Asked(BaseModel, extra="forbid"):
    """What both ways to ask take."""

    model: str = Field(max_length=200)
    stream: bool | None = False
    temperature: Temperature = None
    top_p: Probability = None
    parallel_tool_calls: bool | None = None
    store: Literal[True] | None = Field(None, description="false can't be: an answer lies in Redis until it expires")
    # Without an effect here.
    metadata: Any = None
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_json(cls, body: Any) -> Any:
        try:
            json.dumps(body, allow_nan=False)  # Python's reader takes NaN and Infinity, wherever they stand
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return body

    def params(self) -> dict[str, Any]:
        """The parameters as the API of chat completions has them, which is what models are asked by."""
        raise NotImplementedError

    def beside(self) -> dict[str, Any]:
        """What `ask` takes beside the messages."""
        params = self.params()
        return {"params": params} if params else {}


class Function(BaseModel, extra="forbid"):
    """A function that the model may call; the asker runs it."""

    name: str = Field(max_length=200)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Function):
    """A tool, as the Responses API has it."""

    type: Literal["function"]


class Choice(BaseModel, extra="forbid"):
    """The function that the model is to call."""

    type: Literal["function"]
    name: str = Field(max_length=200)


class ChatTool(BaseModel, extra="forbid"):
    """A tool, as chat completions have it."""

    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel, extra="allow"):
    """A message; what else it holds is the model's business."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class Reasoning(BaseModel, extra="forbid"):
    """How much the model shall think."""

    effort: Effort = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # without an effect: the whole is streamed


class Format(BaseModel, extra="forbid"):
    """Which form the text shall have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("a json_schema has a name and a schema")
        return self


class TextConfig(BaseModel, extra="forbid"):
    """How the text shall be."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseRequest(Asked):
    """What POST /v1/responses takes."""

    input: str | Items
    instructions: str | None = None
    previous_response_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._~-]{1,64}$")
    background: bool | None = False
    max_output_tokens: Tokens = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | Choice | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    stream_options: Any = None

    def params(self) -> dict[str, Any]:
        """In the words of that API."""
        shape, choice = self.text and self.text.format, self.tool_choice
        tools = [{"type": "function", "function": _given(tool, "type")} for tool in self.tools or ()]
        form: Any = None
        if shape and shape.type != "text":
            form = {"type": shape.type}
            form |= {"json_schema": _given(shape, "type")} if shape.type == "json_schema" else {}
        found = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_completion_tokens": self.max_output_tokens,
            "tools": tools or None,
            "tool_choice": {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, Choice)
            else choice,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "verbosity": self.text.verbosity if self.text else None,
            "response_format": form,
        }
        return {name: value for name, value in found.items() if value is not None}


class ChatRequest(Asked):
    """What POST /v1/chat/completions takes."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1_000)]
    stream_options: dict[str, Any] | None = None
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    tools: list[ChatTool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Effort = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2, allow_inf_nan=False)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2, allow_inf_nan=False)] = None
    n: Literal[1] | None = None

    def params(self) -> dict[str, Any]:
        """As they are."""
        kept = set(ChatRequest.model_fields) - {*Asked.model_fields, "messages", "stream_options", "n"}
        kept |= {"temperature", "top_p", "parallel_tool_calls"}
        return self.model_dump(include=kept, exclude_none=True)


def _given(model: BaseModel, *but: str) -> dict[str, Any]:
    return model.model_dump(exclude={*but}, exclude_none=True, by_alias=True)


def messages_of(request: ResponseRequest) -> list[Message]:
    """The messages that a request's items mean; raises Invalid for what models can't be sent here."""
    said: list[Message] = [{"role": "developer", "content": request.instructions}] if request.instructions else []
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    for n, item in enumerate(items):
        place = f"input[{n}]"
        match item:
            case {"type": "function_call", "call_id": str(call), "name": str(name), "arguments": str(arguments)}:
                if not (said and said[-1].get("tool_calls")):
                    said.append({"role": "assistant", "content": None, "tool_calls": []})
                function = {"name": name, "arguments": arguments}
                said[-1]["tool_calls"].append({"id": call, "type": "function", "function": function})
            case {"type": "function_call_output", "call_id": str(call), "output": output}:
                said.append({"role": "tool", "tool_call_id": call, "content": _text(output, place)})
            case {"type": "reasoning"}:
                pass  # models are not told what they thought
            case {"role": "user" | "assistant" | "system" | "developer" as role, "content": content} if (
                item.get("type", "message") == "message"
            ):
                said.append({"role": role, "content": _text(content, place)})
            case _:
                raise Invalid(400, f"{place}: this server takes messages of text, calls and their outputs", place)
    return said


def _text(content: Any, place: str) -> str:
    parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    texts = []
    for part in parts if isinstance(parts, list) else [None]:
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str(text)} | {"refusal": str(text)}:
                texts.append(text)
            case _:
                raise Invalid(400, f"{place}: its content is to be a text, or parts that are text", place)
    return "".join(texts)

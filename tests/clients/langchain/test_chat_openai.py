"""LangChain's standard tests of chat models, through `ChatOpenAI`.

What a model of 135 million parameters cannot do is marked with its reason; everything else must pass.
"""

import os

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

NOWHERE = "http://127.0.0.1:9"
PARAMETERS = {"model": "smollm2", "api_key": "unused", "max_retries": 0}
# The penalty keeps a model this small from repeating itself until the tokens run out.
SHORT = {"temperature": 0, "frequency_penalty": 0.8, "max_tokens": 160, "stream_usage": True}


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return PARAMETERS | {"base_url": NOWHERE + "/v1"}

    @property
    def init_from_env_params(self):
        return (
            {"OPENAI_API_KEY": "k", "OPENAI_API_BASE": NOWHERE + "/v1"},
            {"model": "smollm2"},
            {"openai_api_key": "k", "openai_api_base": NOWHERE + "/v1"},
        )


class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return PARAMETERS | SHORT | {"base_url": os.environ.get("SERVER_URL", NOWHERE) + "/v1"}

    @property
    def supports_image_inputs(self):
        # The model takes text only.
        return False

    @property
    def supports_json_mode(self):
        return True

    # Schemas of LangChain's tools allow further keys, and the model writes some of them.
    @pytest.mark.xfail(reason="asked for one call, the model makes several, with keys of its own")
    def test_tool_calling(self, model):
        super().test_tool_calling(model)

    @pytest.mark.xfail(reason="asked for one call, the model makes several, with keys of its own")
    async def test_tool_calling_async(self, model):
        await super().test_tool_calling_async(model)

    @pytest.mark.xfail(reason="the model makes up an argument for a function that has none")
    def test_tool_calling_with_no_arguments(self, model):
        super().test_tool_calling_with_no_arguments(model)

    @pytest.mark.xfail(reason="the model does not decide by itself to call a function")
    def test_agent_loop(self, model):
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason="without a strict schema the model adds keys of its own")
    def test_structured_output_pydantic_2_v1(self, model):
        super().test_structured_output_pydantic_2_v1(model)

    @pytest.mark.xfail(reason="told in words which keys to write, the model nests them in each other")
    def test_json_mode(self, model):
        super().test_json_mode(model)

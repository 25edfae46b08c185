"""LangChain's standard tests of chat models, through `ChatOpenAI`.

What a model of 135 million parameters cannot do is marked with its reason; everything else must pass.
"""

import os

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

PARAMETERS = {
    "model": "smollm2",
    "base_url": os.environ.get("LOCKET_URL", "http://127.0.0.1:9") + "/v1",
    "api_key": "unused",
    "max_retries": 0,
}
SHORT = {"temperature": 0, "max_tokens": 48, "stream_usage": True}


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return PARAMETERS

    @property
    def init_from_env_params(self):
        return (
            {"OPENAI_API_KEY": "k", "OPENAI_API_BASE": "http://127.0.0.1:9/v1"},
            {"model": "smollm2"},
            {"openai_api_key": "k", "openai_api_base": "http://127.0.0.1:9/v1"},
        )


class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return PARAMETERS | SHORT

    @property
    def supports_image_inputs(self):
        # The model takes text only.
        return False

    @property
    def supports_json_mode(self):
        return True

"""Chat models: from a conversation to a reply, by a model here or behind an endpoint."""

from rectify.chat.cache import CachedChat, ReplyCache
from rectify.chat.endpoint import EndpointChat
from rectify.chat.load import CHATS, make_chat
from rectify.chat.local import LocalChat
from rectify.chat.model import ChatModel, ChatSampling, Message
from rectify.errors import ChatError, ReplyError

__all__ = [
    "CHATS",
    "CachedChat",
    "ChatError",
    "ChatModel",
    "ChatSampling",
    "EndpointChat",
    "LocalChat",
    "Message",
    "ReplyCache",
    "ReplyError",
    "make_chat",
]

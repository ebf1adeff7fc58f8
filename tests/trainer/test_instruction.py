"""Chats as rows of the store: templates as transformers renders them, and whose tokens are learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.trainer.memory import Memory, config_of, learner_of
from tests.trainer.rank.lm import BOS, END, EOS, save_tokenizer

from finetune_trainer import tasks
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import read_text
from finetune_trainer.preflight import preflight
from finetune_trainer.tasks.base import IGNORED, RowError, Tools
from finetune_trainer.tasks.chat import Chats
from finetune_trainer.tasks.instruction import last_turn

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 400,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}[A]{% generation %}{{ message.content }}</s>"
    "{% endgeneration %}{% else %}[{{ message.role }}]{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' "
    "+ message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + message['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}{% if message.role == 'assistant' and not loop.last %}[A]...{% else %}"
    "[{{ message.role }}]{{ message.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{%- for message in messages %}\n"
    "    {%- set ns = namespace(called=false) %}\n"
    "    {%- if message.tool_calls %}{% set ns.called = true %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' + message.content }}\n"
    "    {%- for call in message.tool_calls or [] %}{{ call.function | tojson(indent=2) }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}\n"
    "    {{- '<|im_end|>\n' }}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "the cat"}
SYSTEM = {"role": "system", "content": "be kind & <short>"}
CHAT = [USER, ANSWER, {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "the dog  "}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLING = [
    SYSTEM,
    USER,
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"x": "é<1>"}}}]},
    {"role": "tool", "content": "42"},
    ANSWER,
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return directory


def tools_of(base: Path, *, limit: int = 300, overlong: Any = "Truncate", template: str | None = None) -> Tools:
    settings = json.loads((base / "tokenizer_config.json").read_text())
    if template is not None:
        settings["chat_template"] = template
    text = read_text(CONFIG, (base / "tokenizer.json").read_text(), settings, asked=limit, uri="s3://base")
    return Tools(text, overlong, CONFIG)


def task_of(**options: Any) -> Any:
    return tasks.get(config_of("instruction", task=options))


def piece_of(row: dict[str, Any], tools: Tools, **options: Any) -> Any:
    task = task_of(**options)
    (found,) = task.encode([task.read_row(row)], tools)
    return found if isinstance(found, RowError) else found[0]


def learned(row: dict[str, Any], tools: Tools, **options: Any) -> str:
    """The text of the tokens that are learned."""
    assert tools.text is not None
    piece = piece_of(row, tools, **options)
    ids = [token for token, mine in zip(piece.columns["input_ids"], piece.columns["learned"], strict=True) if mine]
    return str(tools.text.tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("template", "messages", "given"),
    [
        (CHATML, [SYSTEM, *CHAT], None),
        (LLAMA2, CHAT, None),
        (MARKED, CHAT, None),
        (TOOLS, CALLING, [TOOL]),
        (TOOLS, CHAT, None),
        (BARE, CHAT, None),
    ],
    ids=["chatml", "llama-2", "marked", "tool calls", "no tools", "bare"],
)
def test_text_and_tokens_are_those_of_transformers(
    base: Path, template: str, messages: list[dict[str, Any]], given: Any
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(base)
    theirs.chat_template = template
    tools = tools_of(base, template=template)
    assert tools.text is not None
    ours = Chats(tools.text, None).template
    for prompt in (False, True):
        wanted = theirs.apply_chat_template(messages, tools=given, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, tools=given, add_generation_prompt=prompt) == wanted
    ids = theirs.apply_chat_template(messages, tools=given, return_dict=False)
    assert list(piece_of({"messages": messages, "tools": given}, tools).columns["input_ids"])[: len(ids)] == list(ids)


def test_marks_of_a_template_are_those_of_transformers(base: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(base)
    theirs.chat_template = MARKED
    found = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    piece = piece_of({"messages": CHAT}, tools_of(base, template=MARKED))
    assert piece.columns["learned"].tolist() == found["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, "the cat<|im_end|>the dog  <|im_end|>"),
        (LLAMA2, " the cat </s> the dog </s>"),
        (MARKED, "the cat</s>the dog  </s>"),
        (BARE, "the cat\nthe dog  \n</s>"),
        (None, "the cat<|im_end|>the dog  <|im_end|>"),
    ],
)
def test_only_the_assistants_tokens_are_learned_with_their_ends(base: Path, template: str | None, wanted: str) -> None:
    assert learned({"messages": CHAT}, tools_of(base, template=template)) == wanted


def test_all_tokens_are_learned_where_that_is_asked_for(base: Path) -> None:
    text = learned({"messages": CHAT}, tools_of(base, template=CHATML), trainOn="all")
    assert text.startswith("user\nwho?<|im_end|>\n")  # the very first token has nothing before it
    assert text.endswith("the dog  <|im_end|>\n")


def test_what_a_tool_says_is_not_learned_and_what_calls_it_is(base: Path) -> None:
    text = learned({"messages": CALLING, "tools": json.dumps([TOOL])}, tools_of(base, template=TOOLS))
    assert '"name": "look"' in text
    assert "42" not in text
    assert text.endswith("the cat<|im_end|>")


def test_a_prompt_and_a_completion_are_a_chat_of_two(base: Path) -> None:
    tools = tools_of(base, template=CHATML)
    pair = piece_of({"prompt": "who?", "completion": "the cat"}, tools)
    chat = piece_of({"messages": [USER, ANSWER]}, tools)
    both = piece_of({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, tools)
    assert pair.columns["input_ids"] == chat.columns["input_ids"]
    assert both.columns["input_ids"] == piece_of({"messages": [SYSTEM, USER, ANSWER]}, tools).columns["input_ids"]


def test_the_default_template_is_published_and_the_bases_own_is_not(base: Path) -> None:
    facts = task_of().facts(tools_of(base))
    assert "<|im_start|>" in facts["template"]
    assert facts["ends"] == [END, EOS]
    assert task_of().facts(tools_of(base, template=CHATML))["template"] is None
    given = task_of(chatTemplate=LLAMA2).facts(tools_of(base, template=CHATML))
    assert given["template"] == LLAMA2
    assert given["ends"] == [EOS]
    assert learner_of("instruction", more=facts).files() == {"chat_template.jinja": facts["template"]}


def test_a_default_template_needs_no_token_of_chats(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = (base / "tokenizer.json").read_text()
    for token, other in (("<|im_start|>", "<|one|>"), ("<|im_end|>", "<|two|>")):
        text = text.replace(token, other)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text())
    tools = tools_of(tmp_path)
    assert tools.text is not None
    chats = Chats(tools.text, None)
    assert chats.template.render([USER, ANSWER]) == "<s>### user\nwho?</s>\n### assistant\nthe cat</s>\n"
    assert learned({"messages": CHAT}, tools) == "the cat</s>the dog  </s>"
    (tmp_path / "chat_template.jinja").write_text(chats.source)  # as it is published
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == (
        "<s>### user\nwho?</s>\n### assistant\n"
    )


def test_a_begin_is_never_doubled(base: Path) -> None:
    ids = piece_of({"messages": [USER, ANSWER]}, tools_of(base, template="<s>" + LLAMA2)).columns["input_ids"]
    assert list(ids).count(BOS) == 1


def test_a_template_that_rewrites_what_was_said_is_refused_with_the_reason(base: Path) -> None:
    tools = tools_of(base, template=FORGETFUL)
    found = piece_of({"messages": CHAT}, tools)
    assert isinstance(found, RowError)
    assert "writes earlier messages otherwise when others follow" in str(found)
    assert "{% generation %}" in str(found)
    assert not isinstance(piece_of({"messages": [USER, ANSWER]}, tools), RowError)


def test_what_a_template_refuses_is_said_in_its_words(base: Path) -> None:
    found = piece_of({"messages": [SYSTEM, *CHAT]}, tools_of(base, template=LLAMA2))
    assert isinstance(found, RowError)
    assert "Only user and assistant roles are supported!" in str(found)


@pytest.mark.parametrize("template", ["{% for %}", "{{ ''.__class__.__mro__ }}", "{{ strftime_now('%Y') }}"])
def test_a_template_that_cannot_be_used_ends_preflight(base: Path, template: str) -> None:
    with pytest.raises(DataError, match="A chat cannot be written: the chat template"):
        task_of(chatTemplate=template).facts(tools_of(base))


def test_a_chat_whose_answer_is_cut_off_is_refused_or_dropped(base: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 50}, ANSWER]}
    found = piece_of(row, tools_of(base, template=CHATML, limit=20))
    assert isinstance(found, RowError)
    assert "none of the 20 tokens that data.maxLength allows is the assistant's" in str(found)
    assert piece_of(row, tools_of(base, template=CHATML, limit=20, overlong="Drop")).cut


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_chat_that_is_cut_between_its_answers_is_measured_by_the_last_that_is_left(base: Path, train_on: str) -> None:
    chat = [USER, ANSWER, {"role": "user", "content": "x" * 50}, ANSWER]
    piece = piece_of({"messages": chat}, tools_of(base, template=CHATML, limit=40), trainOn=train_on)
    short = piece_of({"messages": chat[:2]}, tools_of(base, template=CHATML))
    assert piece.columns["turn"] == short.columns["turn"]
    assert piece.cut


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "the column 'messages' is missing; columns found: text"),
        ({"messages": "hello"}, "must hold a list of messages, found text"),
        ({"messages": []}, "must hold a list of messages, found a list"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "message 1 in the column 'messages' must have one",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": 3}]},
            "the content of message 2 in the column 'messages'",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "must be text, found nothing"),
        ({"messages": [USER]}, "must end with one of the assistant"),
        ({"messages": [ANSWER]}, "must not begin with one of the assistant"),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "the last message in the column 'mess",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "holds what is no character"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "the column 'tools' must hold tools as a list or as JSON"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "the column 'tools' must hold a list of tools"),
        ({"prompt": "a"}, "the column 'completion' is missing; columns found: prompt"),
        ({"prompt": " ", "completion": "b"}, "the text in the column 'prompt' is empty"),
        ({"prompt": "a", "completion": 4}, "the column 'completion' must hold text or messages, found the number 4"),
    ],
)
def test_a_bad_row_is_told_from_a_good_one(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said.replace("{", r"\{")):
        task_of().read_row(row)


ORDERLY = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def refused(root: Path, base: Path, rows: list[dict[str, Any]], kind: str = "instruction", **task: Any) -> str:
    """What preflight says of a file of rows."""
    model = root / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((base / name).read_bytes())
    (model / "config.json").write_text(json.dumps(CONFIG))
    save_file({"weight": np.arange(12, dtype=np.float32)}, model / "model.safetensors")
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(
        kind,
        task=task,
        model={"uri": model.as_uri()},
        data={"train": [{"uri": (root / "chats.jsonl").as_uri()}]},
        output={"uri": (root / "output").as_uri()},
    )
    with pytest.raises(DataError) as found:
        preflight(config, credentials=None, work=root / "work")
    return str(found.value)


GOOD, PAIR = {"messages": [USER, ANSWER]}, {"prompt": "who?", "completion": "the cat"}
ROBOT, SILENCE = {"role": "robot", "content": "a"}, {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (GOOD, {"messages": [USER]}, "the messages in the column 'messages' must end with one of the assistant"),
        (GOOD, {"messages": [ROBOT, ANSWER]}, "message 1 in the column 'messages' must have one of the roles system,"),
        (GOOD, {"messages": [USER, SILENCE]}, "the last message in the column 'messages' is empty"),
        (PAIR, {**PAIR, "completion": " "}, "the text in the column 'completion' is empty"),
        (
            PAIR,
            GOOD,
            "the row has messages where the first row has a prompt and a completion; write all rows in one way",
        ),
    ],
    ids=["no answer", "unknown role", "empty answer", "empty completion", "two forms"],
)
def test_preflight_names_file_row_and_remedy(
    base: Path, tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], said: str
) -> None:
    found = refused(tmp_path, base, [good, good, bad, good])
    assert f"chats.jsonl:3: {said}" in found
    assert "; mend or remove the row" in found or "; write all rows in one way" in found


def test_preflight_names_the_row_whose_roles_are_out_of_order_for_the_template(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"is it {number}?"}, ANSWER]} for number in range(60)]
    rows[7] = {"messages": [USER, USER, ANSWER]}
    found = refused(tmp_path, base, rows, chatTemplate=ORDERLY)
    assert "chats.jsonl:8: the chat template refuses the messages (roles must alternate user/assistant)" in found
    assert "; mend or remove the row" in found


words = st.text(st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="<|"), min_size=1, max_size=12)
chats = st.lists(words.filter(str.strip), min_size=2, max_size=6).filter(lambda found: len(found) % 2 == 0)


@settings(deadline=None)
@given(chats, st.sampled_from([CHATML, MARKED, None]))
def test_what_is_learned_is_exactly_what_the_assistant_says(base: Path, said: list[str], template: str | None) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]
    tools = tools_of(base, template=template)
    text = learned({"messages": messages}, tools)
    end = "</s>" if template == MARKED else "<|im_end|>"
    assert text == "".join(answer + end for answer in said[1::2])


@given(st.lists(st.booleans(), min_size=1).filter(any))
def test_the_last_turn_begins_behind_what_is_not_the_assistants(mine: list[bool]) -> None:
    turn = last_turn(np.array(mine))
    last = max(place for place, own in enumerate(mine) if own)
    assert all(mine[turn : last + 1])
    assert turn == 0 or not mine[turn - 1]


def test_labels_are_the_assistants_tokens_and_counted(base: Path) -> None:
    tools = tools_of(base, template=CHATML)
    pieces = [piece_of({"messages": chat}, tools) for chat in (CHAT, [USER, ANSWER])]
    store = Memory(
        input_ids=[piece.columns["input_ids"] for piece in pieces],
        learned=[piece.columns["learned"] for piece in pieces],
        turn=[piece.columns["turn"] for piece in pieces],
    )
    learner = learner_of("instruction", more=task_of().facts(tools))
    batch = learner.collate(store, np.array([0, 1]))
    known = batch["labels"] != IGNORED
    assert known.sum() == learner.count(store, np.array([0, 1]))
    assert (batch["labels"][known] == batch["input_ids"][known]).all()
    packed = learner.collate_packs(store, [np.array([0, 1])])
    assert (packed["labels"] != IGNORED).sum() == known.sum()


def test_scores_of_answers_are_those_of_the_libraries() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("the cat", "the cat"), ("the dog sees", "a dog"), ("red", "")]
    reference, hypothesis = (np.array([pair[side] for pair in pairs], dtype=object) for side in (0, 1))
    learner = learner_of("instruction")
    settled = learner.settle({"reference": reference, "hypothesis": hypothesis, "place": np.arange(3)})
    scorer = RougeScorer(["rougeL"])
    wanted = [scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs]
    assert settled["rouge-l"].tolist() == pytest.approx(wanted)
    assert learner.metrics(settled) == {"exact-match": pytest.approx(1 / 3), "rouge-l": pytest.approx(np.mean(wanted))}
    assert learner.shown(settled) == ([a for a, _ in pairs], [b for _, b in pairs])
    assert learner.shown({"loss": np.ones(3)}) is None

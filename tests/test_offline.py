# SPDX-License-Identifier: Apache-2.0
"""``Qwen3ASR`` on the tiny checkpoint, which really transcribes."""

from __future__ import annotations

import base64
import doctest
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from support.audio import DATA, by_voice, dialogue, dialogue_turns, heldout
from support.checkpoints import CHECKPOINT, published_model
from support.checks import MOST_ERRORS, MOST_TIMING_ERROR_S, assert_timed, error_rate, eventually
from support.engines import engine

from qwen3_asr_vllm import batch_engine, offline
from qwen3_asr_vllm.alignment import AlignmentRequest
from qwen3_asr_vllm.chat_template import load_protocol
from qwen3_asr_vllm.cli import entry as cli
from qwen3_asr_vllm.cli import main, models
from qwen3_asr_vllm.decoding import Decoding, max_new_tokens, settled_length
from qwen3_asr_vllm.diarizers import DiarizerThread
from qwen3_asr_vllm.engine import sampling_params
from qwen3_asr_vllm.formats import FORMATS
from qwen3_asr_vllm.geometry import SAMPLE_RATE
from qwen3_asr_vllm.languages import LANGUAGES
from qwen3_asr_vllm.offline import ForcedAligner, Qwen3ASR
from qwen3_asr_vllm.prompt import PUBLISHED, build_prompt, parse_output
from qwen3_asr_vllm.transcription import CUT_OFF

pytestmark = pytest.mark.vllm

HELLO = DATA / "hello.flac"


@pytest.fixture(scope="module")
def transcripts(model):
    paths = [DATA / "heldout" / row["audio_filepath"] for row in heldout()]
    return [result.transcript for result in model.transcribe(paths)]


@pytest.mark.parametrize(("language", "most"), MOST_ERRORS.items())
def test_heldout_error_rate(transcripts, language, most):
    """Sentences that training never saw, half of them in unseen voices."""
    answers = [transcript.text for transcript in transcripts]
    assert error_rate(heldout(), answers, language) < most


def test_heldout_languages(transcripts):
    right = [t.language == row["language"] for t, row in zip(transcripts, heldout(), strict=True)]
    assert sum(right) >= 0.97 * len(right)


def test_paths_and_samples_transcribe_alike(model):
    samples, rate = soundfile.read(HELLO, dtype="float32")
    assert rate == SAMPLE_RATE
    results = model.transcribe([HELLO, samples])
    from_path, from_array = (result.transcript for result in results)
    assert from_path == from_array
    assert from_path.duration == len(samples) / rate
    expected = HELLO.with_suffix(".txt").read_text()
    assert jiwer.wer(expected.lower(), from_path.text.lower()) < 0.05


def test_examples_of_the_docstrings(model, monkeypatch):
    monkeypatch.chdir(DATA.parent.parent)
    failures, examples = doctest.testmod(offline, extraglobs={"model": model})
    assert examples >= 3 and failures == 0


def test_clips_are_not_hashed_for_a_cache(model, monkeypatch):
    from vllm.multimodal.hasher import MultiModalHasher

    monkeypatch.setattr(MultiModalHasher, "hash_kwargs", None)  # a call fails
    assert model.transcribe(HELLO).text


def test_alone_and_among_others_are_the_same(model, transcripts):
    """Alone, in order, as they are done, and in two runs that take turns."""
    paths = [DATA / "heldout" / row["audio_filepath"] for row in heldout()[:20]]
    alone = [model.transcribe(path) for path in paths[:3]]
    assert alone == transcripts[:3]
    as_done = {r.index: r.transcript for r in model.transcribe(iter(paths), in_order=False)}
    assert [as_done[i] for i in range(20)] == transcripts[:20]
    turns = zip(model.transcribe(paths), model.transcribe(paths[::-1]), strict=True)
    pairs = [(one.transcript, other.transcript) for one, other in turns]
    assert pairs == list(zip(transcripts[:20], transcripts[19::-1], strict=True))


def test_abandoned_runs_free_the_engine(model, transcripts):
    path = DATA / "heldout" / heldout()[0]["audio_filepath"]
    results = model.transcribe([path] * 40)
    next(results)
    results.close()
    assert not model.llm.llm_engine.has_unfinished_requests()
    assert model.transcribe(path) == transcripts[0]


def test_a_long_recording_is_transcribed_whole(model, transcripts):
    """The held-out sentences, over and over with pauses, for 15 minutes, in clips of 12 s."""
    paths = [DATA / "heldout" / row["audio_filepath"] for row in heldout()]
    pause = np.zeros(SAMPLE_RATE, np.float32)
    sounds = [part for path in paths for part in (soundfile.read(path, dtype="float32")[0], pause)]
    recording = np.resize(np.concatenate(sounds), 900 * SAMPLE_RATE)
    seen = []
    transcript = model.transcribe(recording, max_clip_s=12, progress=seen.append)
    assert transcript.duration == seen[-1].seconds_done == 900
    assert transcript.segments[-1].end > 880
    assert set(transcript.languages) == {"English", "German", "Chinese"}
    assert "".join(segment.text for segment in transcript.segments) == transcript.text


def test_oversized_clips_fail_only_their_recording(model):
    long = np.resize(soundfile.read(HELLO, dtype="float32")[0], 600 * SAMPLE_RATE)
    long_one, hello = model.transcribe([long, HELLO], max_clip_s=600)
    assert long_one.transcript is None and "4096" in str(long_one.error)
    assert hello.transcript is not None


def test_forced_languages_reach_the_transcript(model):
    assert model.transcribe(HELLO, language="en").language == "English"
    assert model.transcribe(HELLO, language="de").language == "German"


def test_unknown_languages_fail_before_the_engine(model):
    with pytest.raises(ValueError, match="'klingon'.*en English"):
        model.transcribe(HELLO, language="klingon")


def test_files_without_audio_are_named(model, tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("these are words, not sounds")
    with pytest.raises(ValueError, match="notes.wav"):
        model.transcribe(path)
    hello, notes, gone = model.transcribe([HELLO, path, tmp_path / "gone.wav"])
    assert hello.transcript and "notes.wav" in str(notes.error) and "gone.wav" in str(gone.error)


def test_silence_is_no_text_and_no_language(model):
    transcript = model.transcribe(np.zeros(5 * SAMPLE_RATE, np.float32))
    assert (transcript.text, transcript.language) == ("", None)


@pytest.mark.parametrize("language", ["he", "heb", "Hebrew", "he-IL"])
def test_a_declared_language_is_forced(model, language):
    """The plumbing only: the tiny checkpoint learned no Hebrew."""
    transcript = model.transcribe(HELLO, language=language, word_timestamps=True)
    assert (transcript.language, transcript.codes) == ("Hebrew", ("he",))
    assert "does not know Hebrew" in transcript.warnings[0]
    assert json.loads(transcript.to("verbose_json"))["languages"] == [{"code": "he"}]
    waveform = soundfile.read(HELLO, dtype="float32")[0]
    stream = model._stream(language=language)
    stream.push(waveform[: 3 * SAMPLE_RATE])
    assert stream.request().prompt.endswith("language Hebrew<asr_text>")


def test_an_undeclared_language_is_refused_with_advice(model):
    with pytest.raises(ValueError, match="QWEN3_ASR_LANGUAGES=sw=Swahili.*he Hebrew"):
        model.transcribe(HELLO, language="sw")
    with pytest.raises(ValueError, match="languages has 'he:Hebrew'"):
        Qwen3ASR(str(CHECKPOINT), languages="he:Hebrew")


def test_a_stream_detects_one_of_its_languages(model):
    """Candidates are scored, and one forced where the model names another language."""
    waveform = soundfile.read(HELLO, dtype="float32")[0]
    updates = model.stream(np.array_split(waveform, 3), languages=["de", "he"])
    assert "".join(update.delta for update in updates)


@pytest.fixture
def with_defaults(model, monkeypatch):
    """``Qwen3ASR`` on the one engine, as if a checkpoint had these defaults."""

    def made(**defaults):
        monkeypatch.setattr(model.llm.model_config, "override_generation_config", defaults)
        monkeypatch.setattr(offline, "load_engine", lambda *_: model.llm)
        return Qwen3ASR(str(CHECKPOINT))

    return made


def test_defaults_of_the_checkpoint_are_decoded_with(model, with_defaults):
    """As vLLM decodes with the same parameters; those of the published checkpoints are greedy."""
    from vllm import SamplingParams

    clip = soundfile.read(HELLO, dtype="float32")[0]
    prompt = {"prompt": build_prompt(), "multi_modal_data": {"audio": (clip, SAMPLE_RATE)}}
    penalty = SamplingParams(temperature=0, repetition_penalty=1.9, max_tokens=12)
    (expected,) = model.llm.generate(prompt, penalty, use_tqdm=False)
    greedy = model.transcribe(HELLO).text
    made = with_defaults(repetition_penalty=1.9, max_new_tokens=12)
    assert made.transcribe(HELLO).text == parse_output(expected.outputs[0].text).text != greedy
    assert made.transcribe(HELLO).warnings == (f"0.0-{len(clip) / SAMPLE_RATE:.1f} s: {CUT_OFF}",)
    assert with_defaults(temperature=1e-6).transcribe(HELLO).text == greedy
    assert with_defaults(temperature=2.0).transcribe(HELLO).text != greedy


def test_a_stream_decodes_with_the_defaults(with_defaults):
    stream = with_defaults(max_new_tokens=4)
    waveform = soundfile.read(HELLO, dtype="float32")[0][: 2 * SAMPLE_RATE]
    text = "".join(update.delta for update in stream.stream([waveform]))
    assert len(text) <= 20


def test_three_languages_stay_in_order(model):
    transcript = model.transcribe(DATA / "three_languages.flac", max_clip_s=12)
    assert list(transcript.languages) == ["English", "German", "Chinese"]
    assert "".join(s.text for s in transcript.segments) == transcript.text
    times = [time for s in transcript.segments for time in (s.start, s.end)]
    assert times == sorted(times) and times[-1] <= transcript.duration


def test_prompts_equal_the_chat_template(model):
    """Byte for byte, with and without context, by the template in the checkpoint (V1)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    template = json.loads((CHECKPOINT / "chat_template.json").read_text())["chat_template"]
    for context in ("", "Kathrin, Maier"):
        messages = [
            {"role": "system", "content": [{"type": "text", "text": context}]},
            {"role": "user", "content": [{"type": "audio", "audio": "x"}]},
        ]
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert build_prompt(context=context) == rendered
        assert build_prompt(context=context, protocol=model._protocol) == rendered


def test_another_template_reaches_the_engine(model, monkeypatch):
    """One without a system turn, by recording, stream and chat."""
    from vllm import SamplingParams

    template = (
        "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
        "{{ '<|im_start|>assistant\n' }}"
    )
    protocol = load_protocol(model.llm.model_config, model.llm.get_tokenizer(), template)
    monkeypatch.setattr(model, "_protocol", protocol)
    transcript = model.transcribe(HELLO)
    samples, _ = soundfile.read(HELLO, dtype="float32")
    whole = model.stream([samples], step_s=60)
    assert "".join(update.delta for update in whole) == transcript.text
    audio = base64.b64encode(HELLO.read_bytes()).decode()
    part = {"type": "audio_url", "audio_url": {"url": f"data:audio/flac;base64,{audio}"}}
    params = SamplingParams(temperature=0, max_tokens=200)
    messages = [{"role": "user", "content": [part]}]
    (chat,) = model.llm.chat(messages, params, use_tqdm=False, chat_template=template)
    assert chat.outputs[0].text == f"language {transcript.language}<asr_text>{transcript.text}"
    prompt = model.llm.get_tokenizer().decode(chat.prompt_token_ids)
    assert re.sub(r"(<\|audio_pad\|>)+", r"\1", prompt) == build_prompt(protocol=protocol)
    warned = model.transcribe(HELLO, context="Ada")
    assert warned.text == transcript.text and "no place for a context" in warned.warnings[0]


@pytest.mark.parametrize("language", ["", "fil", "zh-HK", "English"])
def test_the_core_route_sends_the_same_prompt(model, language):
    """Prompts of vLLM's own transcription route, token for token.

    V3: vLLM refuses a class that lists "fil"; this one takes it all the same.
    """
    from vllm.config.speech_to_text import SpeechToTextParams

    from qwen3_asr_vllm.languages import resolve_language
    from qwen3_asr_vllm.model.transcriber import Qwen3ASRForConditionalGeneration as architecture

    model_config = model.llm.model_config
    params = SpeechToTextParams(
        audio=np.zeros(16_000, np.float32),
        stt_config=architecture.get_speech_to_text_config(model_config, "transcribe"),
        model_config=model_config,
        language=architecture.validate_language(language),
        request_prompt="A call.<|im_end|>",
        hotwords="Kathrin, Maier",
    )
    sent = architecture.get_generation_prompt(params)["prompt_token_ids"]
    expected = build_prompt(context="A call.\nKathrin, Maier", language=resolve_language(language))
    assert model.llm.get_tokenizer().decode(sent) == expected


@pytest.mark.parametrize("kind", ["audio_url", "input_audio"])
def test_llm_chat_transcribes_audio(model, kind):
    from vllm import SamplingParams

    file = io.BytesIO()
    soundfile.write(file, *soundfile.read(HELLO), format="WAV")
    audio = base64.b64encode(file.getvalue()).decode()
    part = {
        "audio_url": {"url": f"data:audio/wav;base64,{audio}"},
        "input_audio": {"data": audio, "format": "wav"},
    }[kind]
    messages = [{"role": "user", "content": [{"type": kind, kind: part}]}]
    answer = model.llm.chat(messages, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
    text = model.transcribe(HELLO).text
    assert answer[0].outputs[0].text == f"language English<asr_text>{text}"


def steps_of(path, size=32_000):
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == SAMPLE_RATE
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def test_streams_equal_whole_transcripts(model):
    path = DATA / "three_languages.flac"
    updates = list(model.stream(steps_of(path), clip_s=10))
    text = "".join(update.delta for update in updates)
    expected = path.with_suffix(".txt").read_text()
    assert jiwer.cer(expected, text) < 0.3
    assert sum(bool(update.delta) for update in updates) > 10  # not all at the end
    assert updates[-1].tentative == ""


def test_streams_have_text_after_one_step(model):
    first = next(model.stream(steps_of(HELLO)))
    assert first.delta == "" and first.tentative != ""


def test_streams_are_independent_of_piece_lengths(model):
    whole = [update.delta for update in model.stream(steps_of(HELLO))]
    pieces = [update.delta for update in model.stream(steps_of(HELLO, 1_111))]
    assert "".join(pieces) == "".join(whole)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(output, columns=39):
    """The lines of a terminal, which redraws a line from its start and erases to its end."""
    lines = [line.split("\r\x1b[K")[-1] for line in output.split("\n")]
    assert all(
        len(drawn) <= columns for line in output.split("\n") for drawn in line.split("\r\x1b[K")
    )
    return " ".join(line.strip() for line in lines).strip()


def test_pipes_stream_like_files(model, monkeypatch, capsys):
    samples, rate = soundfile.read(HELLO, dtype="int16")
    raw = samples.tobytes()
    monkeypatch.setattr("qwen3_asr_vllm.cli.models.load_model", lambda *_: model)
    monkeypatch.setenv("COLUMNS", "40")
    pipe = io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw), buffer_size=4_099))
    monkeypatch.setattr("sys.stdin", pipe)
    assert main(["stream", "-", "-m", "x", "-r", str(rate)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(["stream", str(HELLO), "-m", "x"]) == 0
    assert shown(sys.stdout.getvalue()) == " ".join(lines)


def test_the_command_explains_bad_files(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("qwen3_asr_vllm.cli.models.load_model", lambda *_: model)
    (tmp_path / "notes.wav").write_text("not audio")
    assert main(["stream", str(tmp_path / "notes.wav"), "-m", "x"]) == 1
    assert "not audio" in capsys.readouterr().err


# ---- a corpus on the command line ----

SUFFIXES = ("wav", "flac", "mp3", "ogg", "m4a", "webm")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """200 short recordings in six formats, in three folders; ten of them are broken."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = sorted(heldout(), key=lambda row: row["duration"])[:32]
    encoded = {}
    for index in range(200):
        suffix, row = SUFFIXES[index % 6], rows[index % 32]
        path = folder / f"part{index % 3}" / f"{index:03d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if index % 20 == 7:
            path.write_bytes([b"", b"Dear Sir or Madam", b"RIFF\xff\xff\xff\xffWAVE"][index % 3])
            continue
        if (suffix, row["text"]) not in encoded:
            source = DATA / "heldout" / row["audio_filepath"]
            command = ["ffmpeg", "-loglevel", "error", "-i", source, "-ar", "16000", path]
            subprocess.run(command, check=True)
            encoded[suffix, row["text"]] = path.read_bytes()
        path.write_bytes(encoded[suffix, row["text"]])
    return folder


def contents(folder):
    files = (path for path in folder.rglob("[!.]*") if path.is_file())  # without the index
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_server_engine_and_resumed_corpora_are_equal(
    model, server, corpus, tmp_path, monkeypatch, capsys
):
    """A run on a server is killed (-9) after a few files and goes on; another has an engine."""

    def line(folder):
        out = ["-o", str(folder), "--manifest-out", str(folder / "all.jsonl")]
        return ["transcribe", str(corpus), "-f", "all", *out]

    from_server, from_engine = tmp_path / "server", tmp_path / "engine"
    on_server = [*line(from_server), "--server", server.url]
    process = subprocess.Popen([sys.executable, "-m", "qwen3_asr_vllm.cli", *on_server])
    try:
        eventually(lambda: len([*from_server.rglob("*.srt")]) > 3 or process.poll() is not None)
    finally:
        process.kill()
        process.wait()
    assert 3 < len([*from_server.rglob("*.srt")]) < 190
    assert cli.main(on_server) == 1
    err = capsys.readouterr().err
    assert "are finished" in err and "10 of " in err

    monkeypatch.setattr(models, "load_model", lambda *_: model)
    assert cli.main(line(from_engine)) == 1
    assert "10 of 200 failed: " in capsys.readouterr().err

    served, made = contents(from_server), contents(from_engine)
    assert served.keys() == made.keys()
    assert len(served) == 190 * len(FORMATS) + 1
    differing = [str(path) for path in served if served[path] != made[path]]
    assert [path for path in differing if not path.endswith(".json")] == []
    for path in differing:  # confidences are sums that depend on the batch
        documents = [json.loads(files[Path(path)]) for files in (served, made)]
        for segment in (segment for document in documents for segment in document["segments"]):
            for name in ("avg_logprob", "no_speech_prob", "language_probability"):
                segment.pop(name, None)
        assert documents[0] == documents[1]

    before = contents(from_engine)
    assert cli.main(line(from_engine)) == 1  # only the broken ones are tried
    assert contents(from_engine) == before
    rows = [json.loads(row) for row in before[Path("all.jsonl")].splitlines()]
    assert [row["audio_filepath"] for row in rows] == sorted(r["audio_filepath"] for r in rows)
    assert sum(bool(row["pred_text"]) for row in rows) > 180


WITHOUT_VLLM = """
import sys
sys.modules |= {"vllm": None, "torch": None}  # imports fail
from qwen3_asr_vllm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_is_asked_without_vllm(server, tmp_path):
    part = {"audio_filepath": str(HELLO), "offset": 0, "duration": 10}
    (tmp_path / "parts.jsonl").write_text(json.dumps(part))
    line = ["transcribe", str(HELLO), str(tmp_path / "parts.jsonl"), "--server", server.url]
    command = [sys.executable, "-c", WITHOUT_VLLM, *line]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    whole, part = result.stdout.splitlines()
    assert whole[:40] == part[:40] == HELLO.with_suffix(".txt").read_text()[:40]


# ---- confidence ----


@pytest.fixture(scope="module")
def sure(model):
    return model.transcribe(HELLO, confidences=True)


@torch.inference_mode()
def logprobs_by_transformers(ids, header, waveform):
    """Of the header, and of the text, token by token; and of " None" in place of the language."""
    from transformers import AutoTokenizer
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    reference, tokenizer = published_model(), AutoTokenizer.from_pretrained(CHECKPOINT)
    mel = Qwen3ASRFeatureExtractor()(
        waveform, sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True
    )
    features = reference.get_audio_features(mel["input_features"], mel["attention_mask"])
    audio = features.pooler_output
    pads = "<|audio_pad|>" * len(audio)
    prompt = tokenizer.encode(build_prompt().replace("<|audio_pad|>", pads))
    opening = tokenizer.encode(header)
    answer = torch.tensor([[*prompt, *opening, *ids]])
    embeds = reference.get_input_embeddings()(answer)
    embeds[answer == reference.config.audio_token_id] = audio
    scores = reference(inputs_embeds=embeds).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = scores.gather(-1, answer[0, len(prompt) :, None])[:, 0].tolist()
    no_speech = scores[1, tokenizer.encode(" None")[0]].item()
    return chosen[: len(opening)], chosen[len(opening) :], no_speech


def test_confidences_are_those_of_transformers(sure):
    samples, _ = soundfile.read(HELLO, dtype="float32")
    tokens = [token for segment in sure.segments for token in segment.tokens]
    assert "".join(token.text for token in tokens) == sure.text
    header = f"language {sure.language}<asr_text>"
    opening, text, no_speech = logprobs_by_transformers([t.id for t in tokens], header, samples)
    at = 0
    for segment in sure.segments:
        expected = np.mean(text[at : at + len(segment.tokens)])
        assert segment.avg_logprob == pytest.approx(expected, abs=1e-3)
        assert segment.language_probability == pytest.approx(np.exp(sum(opening[1:-1])), abs=1e-3)
        assert segment.no_speech_prob == pytest.approx(np.exp(no_speech), abs=1e-3)
        at += len(segment.tokens)
    assert at == len(text)


def test_asking_for_confidences_changes_no_text(model, sure):
    assert model.transcribe(HELLO).text == sure.text


def test_candidate_languages_constrain_only_the_language(model):
    free = model.transcribe(HELLO)
    among = model.transcribe(HELLO, languages=["de", "en", "zh"], confidences=True)
    assert (among.text, among.language) == (free.text, "English")
    other = model.transcribe(HELLO, languages=["Chinese", "German"], confidences=True)
    assert other.language in ("Chinese", "German")
    assert other.text == model.transcribe(HELLO, language=other.language).text
    sure = among.segments[0].language_probability
    assert sure + other.segments[0].language_probability < 1.001 and sure > 0.5


# ---- a checkpoint that loops ----


def never_ending(path):
    """The shipped checkpoint, damaged: to the decoder, the end is as unlikely as audio."""
    shutil.copytree(CHECKPOINT, path)
    config = json.loads((path / "config.json").read_text())
    config["thinker_config"]["text_config"]["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    head = tensors["thinker.model.embed_tokens.weight"].clone()
    ends = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
    head[ends] = head[config["thinker_config"]["audio_token_id"]].clone()
    tensors["thinker.lm_head.weight"] = head
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_loops_are_stopped_retried_and_reported(tmp_path):
    """It never ends, so it repeats itself in the clip, in both halves, and with a penalty."""
    from vllm import SamplingParams

    samples, _ = soundfile.read(HELLO, dtype="float32")
    budget = max_new_tokens(len(samples) / SAMPLE_RATE)
    unguarded = SamplingParams(temperature=0, max_tokens=budget)
    guarded = sampling_params(Decoding(budget), {})
    prompt = {"prompt": build_prompt(), "multi_modal_data": {"audio": samples}}
    with engine(never_ending(tmp_path / "loops"), start=Qwen3ASR, max_model_len=4096) as model:
        transcript = model.transcribe(HELLO)
        outputs = model.llm.generate([prompt] * 2, [unguarded, guarded], use_tqdm=False)
    burnt, stopped = (output.outputs[0] for output in outputs)
    assert (burnt.finish_reason, len(burnt.token_ids)) == ("length", budget)
    assert (stopped.finish_reason, len(stopped.token_ids) < budget) == ("repetition", True)
    assert transcript.loops >= 3  # the clip and its halves
    assert len(transcript.warnings) == 2
    assert all(
        re.match(r"[\d.]+-[\d.]+ s: (decoding|a repetition loop) ", w) for w in transcript.warnings
    )
    text = parse_output(stopped.text).text
    assert settled_length(text) < len(text) and len(transcript.text) < len(burnt.text)


# ---- words ----


def test_words_are_timed_in_three_languages(model):
    path = DATA / "three_languages.flac"
    timed = model.transcribe(path, max_clip_s=12, word_timestamps=True)
    plain = model.transcribe(path, max_clip_s=12)
    assert (timed.text, timed.languages) == (plain.text, plain.languages)
    assert_timed(timed)
    assert [s.words for s in plain.segments] == [None] * len(plain.segments)
    chinese = [s for s in timed.segments if s.language == "Chinese"]
    assert all(len(w.word.strip(" ，。？！、")) == 1 for s in chinese for w in s.words)


def test_words_are_independent_of_batching(model):
    row = next(row for row in heldout() if row["language"] == "German")
    both = [HELLO, DATA / "heldout" / row["audio_filepath"]]
    together = [r.transcript for r in model.transcribe(both, word_timestamps=True)]
    assert together == [model.transcribe(path, word_timestamps=True) for path in both]


def test_align_times_given_words(model):
    text = HELLO.with_suffix(".txt").read_text()
    transcript = model.align(HELLO, text, language="en")
    assert transcript.text == text.strip()
    assert [word.word.strip() for word in transcript.words] == text.split()
    assert_timed(transcript)
    assert model.align([HELLO], [text]) == [
        replace(transcript, segments=tuple(replace(s, language=None) for s in transcript.segments))
    ]


TIMED = [json.loads(line) for line in (DATA / "timed" / "manifest.jsonl").open()]


@pytest.mark.parametrize("language", ["English", "German", "Chinese"])
def test_words_are_timed_like_the_synthesizer(model, language):
    """Held-out sentences, half of them in unseen voices; mean of all edges."""
    rows = [row for row in TIMED if row["language"] == language]
    paths = [DATA / "timed" / row["audio_filepath"] for row in rows]
    aligned = model.align(paths, [row["text"] for row in rows], language=language)
    errors = []
    for transcript, row in zip(aligned, rows, strict=True):
        said = {place: span for place, *span in row["words"]}
        place = 0
        for word in transcript.words:
            first = place + len(word.word) - len(word.word.lstrip())
            if first in said:
                start, end = said[first]
                errors += [abs(word.start - start), abs(word.end - end)]
            place += len(word.word)
    assert len(errors) >= 2 * 0.9 * sum(len(row["words"]) for row in rows)
    assert np.mean(errors) < MOST_TIMING_ERROR_S


# ---- speakers ----


@pytest.fixture
def diarized_by(model, monkeypatch):
    """Give the model another diarizer for one test."""

    def use(diarizer):
        monkeypatch.setattr(model, "diarizer", diarizer)
        monkeypatch.setattr(model._engine, "_diarizations", DiarizerThread(diarizer))

    return use


@pytest.mark.parametrize("words", [True, False])
def test_four_speakers_say_their_sentences(model, diarized_by, words):
    waveform, _ = dialogue()
    diarized_by(dialogue_turns)
    found = model.transcribe(waveform, diarize=True, word_timestamps=words, max_clip_s=12)
    assert by_voice(found.segments) == {voice: voice for *_, voice, _ in dialogue()[1]}
    assert all(w.speaker == s.speaker for s in found.segments for w in s.words or ())
    assert found.text == model.transcribe(waveform, max_clip_s=12).text


def test_a_library_finds_four_voices(model, diarized_by):
    pytest.importorskip("resemblyzer", reason="the weights of Resemblyzer are in its package")
    from support.voices import diarize

    diarized_by(diarize)
    options = {"word_timestamps": True, "num_speakers": 4, "max_clip_s": 12}
    found = model.transcribe(dialogue()[0], diarize=True, **options)
    assert list(by_voice(found.segments).values()) == ["A", "B", "C", "D"]


def test_recordings_and_their_speakers_stay_together(model, diarized_by):
    diarized_by(lambda waveform: [(0, 99, f"of {len(waveform)}")])
    waveform, _ = dialogue()
    sources = [waveform[: 16_000 * seconds] for seconds in (3, 6, 26)]
    results = list(model.transcribe(sources, diarize=True, max_clip_s=10))
    assert [r.transcript.speakers for r in results] == [(f"of {len(s)}",) for s in sources]


def test_a_failing_diarizer_loses_no_text(model, diarized_by):
    def fail(waveform):
        raise RuntimeError("out of memory")

    diarized_by(fail)
    found = model.transcribe(HELLO, diarize=True)
    assert found.text == model.transcribe(HELLO).text and found.speakers == ()
    assert "speakers are unknown: the diarizer failed" in found.warnings[0]


def test_speakers_need_a_diarizer(model, diarized_by):
    diarized_by(None)
    with pytest.raises(ValueError, match="speakers need a diarizer"):
        model.transcribe(HELLO, diarize=True)
    diarized_by(lambda waveform: [])
    with pytest.raises(ValueError, match="num_speakers: this diarizer does not take it"):
        model.transcribe(HELLO, diarize=True, num_speakers=2)


def test_words_need_an_aligner(model, monkeypatch):
    monkeypatch.setattr(model, "aligner", None)
    with pytest.raises(ValueError, match="aligner='Qwen/Qwen3-ForcedAligner-0.6B'"):
        model.transcribe(HELLO, word_timestamps=True)


@pytest.mark.parametrize("dead", ["engine", "aligner"])
def test_dead_engines_raise_errors_with_advice(monkeypatch, capsys, dead):
    from vllm.v1.engine.exceptions import EngineDeadError

    def die(*_, **__):
        raise EngineDeadError()

    scheduler = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
    llm_engine = SimpleNamespace(vllm_config=scheduler, step=die, abort_request=lambda _: None)
    tokenizer = SimpleNamespace(encode=lambda *_, **__: [0])
    llm = SimpleNamespace(
        llm_engine=llm_engine, get_tokenizer=lambda: tokenizer, enqueue=lambda *_, **__: ["1-x"]
    )
    made, aligner = Qwen3ASR.__new__(Qwen3ASR), ForcedAligner.__new__(ForcedAligner)
    aligner.llm = SimpleNamespace(encode=die)
    made.aligner, made._protocol, made._defaults = aligner, PUBLISHED, {}
    monkeypatch.setattr(batch_engine, "default_params", lambda _: None)
    llm.model_config = None
    made._engine = batch_engine.BatchEngine(llm, made.aligner, LANGUAGES)
    if dead == "engine":
        monkeypatch.setattr(models, "load_model", lambda *_: made)
        assert main(["transcribe", str(HELLO)]) == 1
        assert capsys.readouterr().err.startswith("qwen3-asr: the engine died; what it wrote")
        return
    made._engine.submit(AlignmentRequest("", np.zeros(1, np.float32)), None)
    for ask in made._engine.step, partial(made.align, HELLO, "Hi."):
        with pytest.raises(OSError, match="the aligner died; .* Load it again"):
            ask()
    monkeypatch.setattr(models, "load_aligner", lambda *_: made.aligner)
    assert main(["align", str(HELLO), str(HELLO.with_suffix(".txt"))]) == 1
    assert capsys.readouterr().err.startswith("qwen3-asr: the aligner died")


def test_a_transcriber_is_no_aligner(model):
    from qwen3_asr_vllm.engine import class_ms

    with pytest.raises(ValueError, match="is no forced aligner"):
        class_ms(model.llm.model_config)

"""Settings: YAML 1.2, every complaint at once with its line, and the right key for every wrong one."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_ft.config import NOT_NEEDED, PEERS, REMARKS, Config, load_config
from qwenvl_ft.errors import Problem, UserError

REQUIRED = "model: m\ntrain_meta_file: train.json\ntrain_data_dir: images\noutput_dir: runs/a\n"
# A key that is renamed or taken away breaks somebody's file: add here, never change.
KEYS = """
    model train_meta_file train_data_dir output_dir eval_meta_file eval_data_dir
    min_pixels max_pixels video_fps video_max_frames video_max_pixels
    row_tokens share_prefix cache_features thinking boxes media_position fetch_media format columns on_bad_record dataloader_num_workers
    lora_on lora_targets lora_rank lora_alpha lora_dropout use_rslora use_dora loraplus_lr_ratio init_lora_weights
    init_adapter
    num_train_epochs max_steps rows_per_step learning_rate lr_scheduler_type warmup_ratio weight_decay max_grad_norm seed
    dtype quantization attn_implementation gradient_checkpointing fit shard_base ddp_timeout
    logging_steps eval_steps eval_metric eval_samples eval_max_new_tokens save_steps save_total_limit keep_best early_stopping_patience resume report_to run_name
"""


@pytest.fixture
def load(tmp_path):
    """The config of a file with the required keys and then these lines, which begin at line 5."""

    def load(text: str = "", *overrides: str, required: str = REQUIRED) -> Config:
        path = tmp_path / "a.yaml"
        path.write_text(required + text, encoding="utf-8")
        return load_config(path, overrides)

    return load


@pytest.fixture
def complaints(load, tmp_path):
    """The (where, what, fix) of a file that is refused; `where` without the folder."""

    def complaints(text: str, *overrides: str, required: str = REQUIRED) -> list[tuple[str, str, str]]:
        with pytest.raises(UserError) as error:
            load(text, *overrides, required=required)
        return [(problem.where.replace(f"{tmp_path}/", ""), problem.what, problem.fix) for problem in error.value.problems]

    return complaints


def test_the_keys_are_these():
    assert list(Config.model_fields) == KEYS.split()


def test_numbers_are_read_as_yaml_1_2_has_them(load):
    """PyYAML reads 1e-4 as a text."""
    config = load("learning_rate: 1e-4\nmax_pixels: 1e6\nseed: 010\n")
    assert (config.learning_rate, config.max_pixels, config.seed) == (0.0001, 1_000_000, 10)


def test_a_truth_value_is_true_or_false_and_nothing_else(load, complaints):
    assert load("resume: true\ngradient_checkpointing: False\n").resume is True
    for word in ("no", "off", "0", "'false'"):
        assert complaints(f"resume: {word}\n")[0][2] == "write true, false, or weights"
        (problem,) = complaints(f"fetch_media: {word}\n")
        assert problem == ("a.yaml:5", f"fetch_media is {word.strip(chr(39))}", "it should be a valid boolean")


def test_gradient_checkpointing_is_auto_true_or_false(load, complaints):
    assert [load(f"gradient_checkpointing: {word}\n").gradient_checkpointing for word in ("auto", "true", "false")] == [
        "auto",
        True,
        False,
    ]
    assert load("").gradient_checkpointing == "auto"
    for word in ("1", "off", "[auto]"):
        ((_, _, fix),) = complaints(f"gradient_checkpointing: {word}\n")
        assert fix == "write auto, true or false"


def test_overrides_come_last_and_are_read_as_yaml(load):
    config = load("seed: 1\n", "seed=7", "--learning_rate=5e-5", "report_to=[wandb]", "run_name='a: b'", "max_steps=null")
    assert (config.seed, config.learning_rate, config.report_to) == (7, 5e-5, ["wandb"])
    assert (config.run_name, config.max_steps) == ("a: b", None)


def test_pythons_none_is_none_where_a_key_may_be(load, complaints):
    """A PAI job's hyperparameter eval_meta_file=None was a file called None."""
    config = load("eval_meta_file: None\n", "max_steps=None", "boxes=None")
    assert config.eval_meta_file is config.max_steps is config.boxes is None
    assert complaints("", "seed=None")[0][1] == "seed is None"


def test_one_word_is_a_list_of_one_and_none_is_no_one(load):
    assert load("report_to: wandb\n").report_to == ["wandb"]
    assert load("report_to: none\n").report_to == []
    assert load("lora_on: vision\n").lora_on == ["vision"]


def test_towers_may_have_a_rank_an_alpha_and_a_rate_of_their_own(load, complaints):
    own = load("lora_on: {language: {}, vision: {rank: 8, learning_rate: 2e-5}}\n").own
    assert own["language"].rank is None and (own["vision"].rank, own["vision"].learning_rate) == (8, 2e-5)
    for text, said in {
        "{vision: {ranks: 8}}": "of vision.ranks extra inputs are not permitted", "{visions: {}}": "list language, vision and merger",
        "{vision: {rank: 0}}": "of vision.rank it should be greater than 0", "[]": "list language, vision and merger",
        "{vision: {full: true}}": "{full: true} for the merger only", "{merger: {full: true}}": "add a tower for LoRA",
        "{language: {}, merger: {full: true, rank: 4}}": "without rank and alpha",
    }.items():  # fmt: skip
        ((where, _, fix),) = complaints(f"lora_on: {text}\n")
        assert where == "a.yaml:5" and said in fix
    assert load("init_lora_weights: pissa_niter_16\n").init_lora_weights == "pissa_niter_16" and load().init_lora_weights is True
    assert "write true for a fresh start, pissa" in complaints("init_lora_weights: olora\n")[0][2]
    assert complaints("use_dora: true\ninit_lora_weights: pissa\n")[0][2] == "choose one of PiSSA and use_dora"
    assert (
        complaints("init_adapter: a\ninit_lora_weights: pissa\n")[0][2] == "choose one of init_adapter and init_lora_weights: pissa"
    )
    for key in ("lora_dropout: 0.1", "use_dora: true", "init_lora_weights: pissa"):
        assert "PEFT trains them with plain LoRA only" in complaints(f"lora_on: [language, experts]\n{key}\n")[0][2]
    for key in ("keep_best: true", "early_stopping_patience: 2"):
        assert complaints(f"eval_meta_file: f\n{key}\n")[0][2] == "set eval_meta_file and eval_steps, which it goes by"
    assert complaints("eval_metric: exact\n")[0][2] == "set eval_meta_file, whose questions are asked"
    assert complaints("eval_metric: accuracy\neval_meta_file: f\n")[0][2].startswith("it should be 'loss', 'exact', 'relaxed'")
    ((_, _, fix),) = complaints("lora_targets: '(q_proj'\n")
    assert fix.startswith("write [q_proj, v_proj], or a regular expression of whole names (missing ), unterminated subpattern")


def test_all_problems_of_file_and_overrides_come_at_once(complaints):
    text = "row_tokens: 0\nlearning_rates: 1\ndtype: fp16\nlora_dropout: 1\nlearning_rate: .inf\n"
    found = complaints(text, "epochs=3", "seed=x", "lonely", "run_name=@x", required=REQUIRED.replace("output_dir: runs/a\n", "\n"))
    assert sorted(found) == sorted([
        ("a.yaml:5", "row_tokens is 0", "it should be greater than 0"),
        ("a.yaml:6", "unknown key learning_rates", "did you mean learning_rate?"),
        ("a.yaml:7", "dtype is fp16", "it should be 'auto', 'bfloat16' or 'float32'"),
        ("a.yaml:8", "lora_dropout is 1", "it should be less than 1"),
        ("a.yaml:9", "learning_rate is inf", "it should be a finite number"),
        ("a.yaml", "has no key output_dir", "write output_dir: ..."),
        ("command line, epochs=3", "unknown key epochs", "write num_train_epochs (see configs/lora.yaml)"),
        ("command line, seed=x", "seed is x", "it should be a valid integer, unable to parse string as an integer"),
        ("lonely", "is not an override", "write key=value"),
        ("run_name=@x", "its value is not YAML", """quote it: 'run_name="..."'"""),
    ])  # fmt: skip


@pytest.mark.parametrize(("text", "where", "what"), [
    ("model: n\n", "a.yaml:5:1", 'found duplicate key "model" with value "n" (original value: "m")'),
    ("lora_on: [vision\nseed: 1\n", "a.yaml:6:5", "expected ',' or ']', but got ':'"),
    ("\tseed: 1\n", "a.yaml:5:1", "found character '\\t' that cannot start any token"),
    ("---\nseed: 1\n", "a.yaml:5:1", "but found another document"),
    ("seed: !!python/name:os.system x\n", "a.yaml:5:7",
     "could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"),
    ("seed: *a\n", "a.yaml:5:7", "found undefined alias 'a'"),
    ("<<: {seeds: 1}\n", "a.yaml", "unknown key seeds"),
    ("seed: 2020-13-01\n", "a.yaml", "is not YAML: month must be in 1..12"),
    ("seed: \0\n", "a.yaml", "is not YAML: unacceptable character #x0000: special characters are not allowed"),
    ("seed: " + "[" * 500 + "\n", "a.yaml", "is not YAML: maximum recursion depth exceeded"),
])  # fmt: skip
def test_what_is_not_yaml_is_said_with_its_place(text, where, what, complaints):
    ((found_where, found_what, fix),) = complaints(text)
    assert (found_where, found_what[: len(what)]) == (where, what) and fix


BOMB = "a: &a [x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghijk"))
STUMBLES = [
    "!!bool x",
    "!!int ''",
    "!!float ''",
    "!!omap x",
    "!!set x",
    "{[a, {b: c}]: d}",
    "{{a: b}: c}",
    "!!timestamp x",
    "9" * 5000,
]


@pytest.mark.parametrize(("text", "where", "name"), [
    (BOMB + "seed: *k\n", "a.yaml:6:8", "a"),
    ("a: &a\n  <<: *a\n", "a.yaml:6:7", "a"),
    ("a: &a [*a]\n", "a.yaml:5:8", "a"),
    ("lora_on: &towers [language]\nreport_to: *towers\n", "a.yaml:6:12", "towers"),
    ("a: &s x\nb: &s {c: d}\n<<: *s\n", "a.yaml:7:5", "s"),
])  # fmt: skip
def test_an_alias_of_a_list_or_an_object_is_refused_with_its_place(text, where, name, complaints):
    """A bomb of 315 bytes never came back; one that merged itself was a traceback."""
    problem = (f"the alias *{name} stands for a list or an object", "write the value out")
    assert complaints(text) == [(where, *problem)]


def test_aliases_in_an_override_are_refused_and_those_of_a_text_are_read(load, complaints):
    for value in (BOMB + "k: *k", "&a [*a]", "&a {<<: *a}"):
        assert complaints("", f"seed={value}") == [
            (f"seed={value}", "the alias *a stands for a list or an object", "write the value out")
        ]
    assert load("eval_data_dir: &d images\nrun_name: *d\n").run_name == "images"


@pytest.mark.parametrize("value", STUMBLES, ids=[value[:20] for value in STUMBLES])
def test_what_the_yaml_library_stumbles_over_is_a_problem_in_a_file_and_in_an_override(value, complaints):
    """`seed: !!bool x` was a traceback of KeyError."""
    for found in (complaints(f"seed: {value}\n"), complaints("", f"seed={value}")):
        assert len(found) == 1 and ("seed" in found[0][0] or "a.yaml" in found[0][0])


def test_a_value_without_an_end_is_not_printed_whole(complaints):
    ((_, what, _),) = complaints(f"seed: {'x' * 10_000}\n")
    assert what.startswith("seed is xxx") and len(what) < 300


def test_a_file_without_settings_and_no_file_are_named(complaints, tmp_path):
    for text in ("", "- a\n", "model\n", "# only a comment\n"):
        assert complaints(text, required="")[0][1] == "holds no settings"
    (tmp_path / "gbk.yaml").write_bytes(REQUIRED.encode() + b"run_name: \xb5\xc4\n")
    for path in (tmp_path / "gbk.yaml", tmp_path):
        with pytest.raises(UserError) as error:
            load_config(path)
        assert error.value.problems == (
            Problem(str(path), "cannot be read as a text file", "give a config such as configs/lora.yaml"),
        )
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "no.yaml")
    (problem,) = error.value.problems
    assert (problem.where, problem.what) == (str(tmp_path / "no.yaml"), "is not there") and "`qwenvl-ft init`" in problem.fix


def test_every_key_of_a_peer_is_answered_with_ours(complaints):
    found = complaints("".join(f"{key}: 1\n" for key in PEERS))
    fixes = {ours: f"write {ours}: {REMARKS[ours]}" if ours in REMARKS else f"write {ours} (see configs/lora.yaml)"
             for ours in PEERS.values()}  # fmt: skip
    assert found == [(f"a.yaml:{5 + i}", f"unknown key {key}", fixes[PEERS[key]]) for i, key in enumerate(PEERS)]
    assert set(PEERS.values()) <= set(KEYS.split()) and not PEERS.keys() & set(KEYS.split())


def test_a_peer_s_key_with_another_meaning_is_answered_with_what_to_write(complaints):
    keys = ["val_size", "freeze_vision_tower", "gradient_accumulation_steps", "max_length", "quantization_bit", "pissa_convert"]
    answers = [
        "a file of held-out records", "[language] to keep the vision tower", "the rows of one step over all processes",
        "a longer one is reported, never cut", "nf4 for 4 bits or int8 for 8, by bitsandbytes", "plain LoRA already",
    ]  # fmt: skip
    for (_, _, fix), answer in zip(complaints("".join(f"{key}: 1\n" for key in keys)), answers, strict=True):
        assert answer in fix
    assert REMARKS.keys() <= set(PEERS.values())


@pytest.mark.parametrize("words", ["learning_rate 1e-4", "--learning_rate 1e-4", "--learning-rate 1e-4", "learning_rate = 1e-4"])
def test_a_forgotten_equals_sign_is_one_problem(words, complaints):
    assert complaints("", "seed=1", *words.split(), "seed=2") == [(words, "is not an override", "write learning_rate=1e-4")]


def test_an_empty_value_and_what_is_no_path_are_said_in_words(complaints):
    """It said: input is not a valid path for <class 'pathlib.Path'>."""
    assert complaints("seed:\n", "output_dir=") == [
        ("command line, output_dir=", "output_dir is empty", "give it a value"), ("a.yaml:5", "seed is empty", "give it a value"),
    ]  # fmt: skip
    assert complaints("", "output_dir=7") == [("command line, output_dir=7", "output_dir is 7", "it should be a path, a text")]


@pytest.mark.parametrize("key", ["min_pixels", "max_pixels"])
def test_a_side_or_a_number_of_tokens_in_place_of_an_area_is_refused(key, load, complaints):
    """max_pixels=1280 made every picture one token, without a word."""
    fix = "it is an area, height x width in px: write at least 3136, four tokens of 28 x 28 px"
    assert complaints(f"{key}: 1280\n") == [("a.yaml:5", f"{key} is 1280", fix)]
    assert getattr(load(f"{key}: 3136\n"), key) == 3136


def test_a_key_that_is_not_needed_is_to_be_deleted(complaints):
    found = complaints("".join(f"{key}: 1\n" for key in NOT_NEEDED))
    assert [fix for _, _, fix in found] == [f"delete it: {why}" for why in NOT_NEEDED.values()]
    assert not NOT_NEEDED.keys() & (PEERS.keys() | set(KEYS.split()))


@pytest.mark.parametrize(("key", "fix"), [
    ("lora_ranks", "did you mean lora_rank?"),
    ("Learning-Rate", "did you mean learning_rate?"),
    ("cutof_len", "did you mean row_tokens?"),
    ("Lora-R", "write lora_rank (see configs/lora.yaml)"),
    ("max_lenght", "did you mean row_tokens?"),
    ("zzz", "delete it; configs/lora.yaml lists every key"),
])  # fmt: skip
def test_a_misspelt_key_names_the_nearest(key, fix, complaints):
    assert complaints(f"{key}: 1\n") == [("a.yaml:5", f"unknown key {key}", fix)]


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path):
    if "compute_environment" not in path.read_text():  # those are accelerate's
        assert load_config(path).model


def test_reading_a_config_imports_nothing_heavy():
    code = """
import sys, time
import qwenvl_ft.config
heavy = {"torch", "transformers", "peft", "accelerate", "numpy", "PIL", "rich", "typer", "tokenizers"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert time.process_time() < 2, time.process_time()  # torch alone takes 6 s here
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_min_pixels_above_max_pixels_is_refused_even_where_one_is_the_default(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ntrain_meta_file: f\ntrain_data_dir: d\noutput_dir: o\nmin_pixels: 2000000\n")
    with pytest.raises(UserError, match="set it to at least min_pixels, 2000000"):
        load_config(path)


@pytest.mark.parametrize("rate", ["1e38", "1e308", "1.5"])
def test_a_learning_rate_that_no_weight_survives_is_refused(rate, complaints):
    """From 1e38 on AdamW ended in an OverflowError; below, the weights did."""
    assert [what for _, what, _ in complaints(f"learning_rate: {rate}\n")] == [f"learning_rate is {float(rate)}"]


# Of LLaMA-Factory, ms-swift, TRL, axolotl and Qwen-VL-Series-Finetune: keys that are neither ours nor of ours' meaning.
OF_PEERS = """
    max_samples save_only_model overwrite_output_dir create_new_adapter vision_lr hub_model_id push_to_hub logging_dir plot_loss
    greater_is_better pissa_convert lora_bias ref_model
    mix_strategy interleave_probs overwrite_cache mask_history streaming tool_format default_system max_new_tokens predict_with_generate do_eval do_predict per_device_eval_batch_size eval_accumulation_steps optim
    adam_beta1 lr_scheduler_kwargs min_lr use_liger_kernel use_unsloth neftune_noise_alpha dataloader_pin_memory dataloader_drop_last
    save_safetensors auto_find_batch_size projector_lr merger_lr vit_lr aligner_lr double_quant lazy_preprocess
    nframes dataset_shuffle truncation_strategy loss_scale sequence_parallel_size norm_bbox lora_dtype modules_to_save task_type
    rlhf_type hub_token hub_strategy sample_packing pad_to_sequence_len dataset_prepared_path wandb_entity special_tokens tokenizer_type
    roles_to_train local_rank dataset_text_field eval_packing completion_only_loss eos_token loss_type cache_dir base_model_config
    packing_strategy chat_template swanlab_project create_checkpoint_symlink logging_first_step data_packing plugins
""".split()


THEIRS = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16 bf16_full_eval
    fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config
    use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node
    save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config parallelism_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names train_sampling_strategy
    length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint
    local_rank
""".split()  # the fields of transformers.TrainingArguments


def test_no_key_of_a_peer_gets_a_key_of_another_meaning(complaints):
    """max_samples was told max_steps, save_only_model was told model, vision_lr was told lora_on, local_rank lora_rank."""
    found = complaints("".join(f"{key}: 1\n" for key in OF_PEERS))
    assert [fix for _, _, fix in found] == [f"delete it: {NOT_NEEDED[key]}" for key in OF_PEERS]


def test_no_setting_of_transformers_is_guessed_at(complaints):
    """Each is ours, or has its answer, or is to be deleted: a nearest key would be one of another meaning."""
    names = [name for name in THEIRS if name not in Config.model_fields]
    for (_, _, fix), name in zip(complaints("".join(f"{name}: 1\n" for name in names)), names, strict=True):
        assert not fix.startswith("did you mean"), (name, fix)


@pytest.mark.parametrize(("key", "said"), [
    ("max_samples", "write a smaller meta-file, or set max_steps"), ("overwrite_output_dir", "name a new output_dir"),
    ("adapter_name_or_path", "write init_adapter: the folder of an adapter to train on from"), ("vision_lr", "write it into lora_on: {language: {}, vision: {learning_rate: 2e-5}"),
    ("hub_model_id", "`qwenvl-ft export --push modelscope:ORG/NAME`"), ("save_only_model", "holds the adapter and all that resume needs"),
    ("save_only_modle", "delete it, if save_only_model is meant: a checkpoint holds the adapter"),
    ("warmup_steps", "write warmup_ratio: a share of the run, not a number of steps"),
])  # fmt: skip
def test_what_a_peer_offers_otherwise_is_answered_with_what_there_is(key, said, complaints):
    ((_, _, fix),) = complaints(f"{key}: 1\n")
    assert said in fix


def test_a_learning_rate_by_the_models_width(load, tmp_path):
    """The published value for 7B is 4.8e-4."""
    for settings in ({"hidden_size": 3584}, {"text_config": {"hidden_size": 3584}}):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert load("", f"model={tmp_path}", "learning_rate=auto").learning_rate == pytest.approx(4.8e-4, rel=0.01)
    (tmp_path / "config.json").write_text('{"hidden_size": 192}')
    assert load("", f"model={tmp_path}", "learning_rate=auto").learning_rate > 5.9e-4
    for content in ("[]", "{", '{"hidden_size": 0}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="auto goes by the hidden_size"):
            load("", f"model={tmp_path}", "learning_rate=auto")

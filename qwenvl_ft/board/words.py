"""The words of the pages in Chinese. The English ones are their keys and stand in the pages themselves."""

from collections.abc import Callable

CHINESE = {
    "skip to the content": "跳到正文", "pages": "页面", "Runs": "训练", "Answers": "回答", "New run": "新建训练", "Try": "试一试",
    "There is no run here yet.": "这里还没有训练。", "Start one": "开始一次", "compare": "对比", "run": "训练", "state": "状态",
    "step": "步", "steps": "步", "train loss": "训练损失", "eval loss": "评估损失", "tokens/s": "token/秒", "changed": "更新时间",
    "about": "约剩", "left, about": "约剩", "epochs": "轮", "Lay the chosen over each other": "把选中的叠在一起",
    "running": "运行中", "starting": "启动中", "finished": "已完成", "stopped": "已停止", "failed": "失败", "process": "进程",
    "Stop": "停止", "it saves a checkpoint first": "会先保存检查点", "Go on": "继续训练",
    "New run with these settings": "用这些设置新建训练", "What it printed": "输出日志", "Settings": "设置", "Plan": "计划",
    "Data": "数据", "training": "训练数据", "evaluation": "评估数据", "What differs in their settings": "设置的不同之处",
    "Nothing.": "没有。", "learning rate": "学习率", "peak memory, GiB": "内存峰值，GiB",
    "loss per taught token": "每个被教 token 的损失", "train": "训练", "eval": "评估",
    "who": "谁", "questions": "题", "right": "对", "wrong": "错", "all": "全部",
    "cut": "被截断", "empty": "空", "disagreement": "有分歧",
    "Side by side": "并排查看", "The chosen side by side": "并排查看选中的",
    "There are no answers here yet. These commands leave some:": "这里还没有回答。这些命令会留下回答：",
    "files are more than can be told apart side by side": "个文件并排时分不清", "choose at most": "最多选择",
    "older runs are left out: no more can be told apart": "次较早的训练没有画出：再多就分不清了",
    "lines are no steps and are left out": "行不是训练步，没有显示",
    "values are not what they should be and are left out": "个值不合要求，没有显示",
    "lines are no predictions and are left out": "行不是预测结果，没有显示", "kind": "类别", "Search": "搜索",
    "search in questions and answers": "在问题和回答中搜索", "wanted": "期望", "not asked": "没有问过",
    "cannot be shown": "无法显示",
    "What the terminal would use": "终端会用到的", "Start": "开始", "Show the YAML and the command": "显示 YAML 和命令",
    "what to train on": "在什么上训练", "pictures and rows": "图片和行", "LoRA": "LoRA", "the run": "训练过程",
    "the machine": "机器", "what is written": "写出什么",
    "Over each other": "叠在一起", "problems first": "有问题的在前",
    "only the beginning of the file was read": "只读了文件的开头", "picture": "图片",
    "question": "问题", "base": "基座", "tuned": "微调后", "Ask base and tuned": "同时问基座和微调后的模型",
    "the first time the model is loaded, which takes a while": "第一次要加载模型，需要一些时间",
}  # fmt: skip


def translator(lang: str) -> Callable[[str], str]:
    """What turns the words of a page into those of its language, en or zh. Raises KeyError for words that zh lacks."""
    return CHINESE.__getitem__ if lang == "zh" else str


def language_of(asked: str | None, kept: str | None, accepted: str) -> str:
    """en or zh: as `?lang=` asks, else as the cookie has it, else the first of Accept-Language that is one of them."""
    for lang in (asked, kept):
        if lang in ("en", "zh"):
            return str(lang)
    for part in accepted.lower().split(","):
        if part.strip()[:2] in ("en", "zh"):
            return part.strip()[:2]
    return "en"

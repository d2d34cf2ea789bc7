"""One row of each dataset in columns.py, with the columns on the Hugging Face hub."""

MEDMCQA = {
    "id": "e9",
    "question": "Which one?",
    "opa": "Iron",
    "opb": "Zinc",
    "opc": "Lead",
    "opd": "Gold",
    "cop": 2,
    "choice_type": "single",
    "exp": "Because.",
    "subject_name": "Medicine",
    "topic_name": None,
}
MEDQA = {
    "question": "Which one?",
    "answer": "Zinc",
    "options": {"A": "Iron", "B": "Zinc", "C": "Lead", "D": "Gold"},
    "meta_info": "step1",
    "answer_idx": "B",
    "metamap_phrases": [],
}
ARC = {
    "id": "M_1",
    "question": "Which one?",
    "choices": {"text": ["Iron", "Zinc"], "label": ["1", "2"]},
    "answerKey": "2",
}
PUBMEDQA = {
    "pubid": 1,
    "question": "Does it?",
    "context": {"contexts": ["It may.", "Or not."], "labels": ["A", "B"]},
    "long_answer": "It does.",
    "final_decision": "no",
}
MEDREASON = {
    "dataset_name": "medmcqa",
    "id_in_dataset": 1,
    "question": "Which one?",
    "answer": "Zinc.",
    "reasoning": "So.",
    "options": "Answer Choices:\nA. Iron\nB. Zinc\nC. Lead\nD. Gold",
}
DISTILL = {"question": "Why?", "reasoning (reasoning_content)": "Hm.", "response (content)": "Therefore."}
M23K = {
    "answer_idx": 1,
    "source": "x",
    "metadata": "",
    "prompt": "Which one?\nA. Iron",
    "answer_letter": "A",
    "answer_string": "Iron",
    "reasoning": "So.",
    "distilled_answer_string": "A",
    "text": "tokens",
}
GSM8K = {"question": "How many?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6"}
MBPP = {
    "task_id": 11,
    "text": "Write f.",
    "code": "def f(): pass",
    "test_list": ["assert f() is None"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x",
    "task_id": 11,
    "prompt": "Write f.",
    "code": "",
    "test_imports": [],
    "test_list": ["assert f() is None"],
}
IFEVAL = {"key": 1000, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ZEBRA = {
    "id": "z",
    "size": "2*2",
    "puzzle": "Two houses.",
    "created_at": "x",
    "solution": {"header": ["House", "Name"], "rows": [["1", "Eric"], ["2", "Arnold"]]},
}
COSER = {
    "conversations": [
        {"from": "system", "value": "You are Ahab."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "There."},
    ]
}
NEMOTRON = {
    "uuid": "0a",
    "license": "CC BY 4.0",
    "generator": "DeepSeek-R1-0528",
    "version": "v1",
    "category": "stem",
    "reasoning": "on",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Rayleigh."}],
    "metadata": "{}",
}

"""The published prompts for reasoning and for judging it; every character counts.

Source: the data pipeline of InternVL (``reasoning_data_pipeline/utils/constants.py``); VLMEvalKit
has the same texts.
"""

# system prompt of the thinking mode, as DeepSeek-R1 made it known
R1_SYSTEM_PROMPT = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential "
    "solutions, and reason through the problem step-by-step. Enclose this entire thinking process "
    "within <think> and </think> tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's "
    "question. Separate the answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final "
    "answer should be standalone and not reference the thinking section."
)
THINK_START, THINK_END = "<think>", "</think>"

COT_PROMPT = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and "
    'when you\'re ready to answer, please use the format "Final answer: .."\n\n'
    "Question:\n\n{question}"
)
# asks for the form from which answers are extracted (en_v2)
BOXED_PROMPT = (
    "{question}\n"
    "Answer the preceding question. The last line of your response should follow this format: "
    "'Answer: \\boxed{{$FINAL_ANSWER}}' (without quotes), where 'FINAL_ANSWER' is your conclusion "
    "based on the reasoning provided. If you are uncertain or the problem is too complex, make a "
    "reasoned guess based on the information provided. Avoid repeating steps indefinitely—provide "
    "your best guess even if unsure. Think step by step logically, considering all relevant "
    "information before answering."
)

# system prompt of the published critic data; ** are part of it
PRM_SYSTEM_PROMPT = (
    "You are an advanced AI assistant, designed to serve as a process supervision model. In this "
    "task, I will provide a problem statement followed by the first step of the solution process. "
    "For each subsequent turn, I will give you a new step in the solution. Your role is to assess "
    "whether the solution process is correct up to the current step.\n\n"
    "- In the **first round**, I will input the problem and the first step of the solution "
    "process.\n"
    "- In **each subsequent round**, I will provide the next step in the solution.\n\n"
    "For each step, you should:\n\n"
    '- Respond with **"+"** if you believe the solution process is correct up to this step.\n'
    '- Respond with **"-"** if you detect any issues or errors in the process up to this step.\n\n'
    "Please note:\n"
    '- Only respond with **"+"** or **"-"**. Do not provide any additional explanations, comments, '
    "or justifications.\n\n"
    "Your task is to verify the accuracy and correctness of each step in the given solution "
    "process."
)
CORRECT, INCORRECT = "+", "-"  # a critic's replies


def thinking_system_prompt(system: str | None) -> str:
    """Return the system prompt of the thinking mode; the caller's own follows it."""
    return f"{R1_SYSTEM_PROMPT}\n\n{system}" if system else R1_SYSTEM_PROMPT


def cot_question(question: str) -> str:
    """Ask for step by step reasoning and ``Final answer: ..``."""
    return COT_PROMPT.format(question=question)


def boxed_question(question: str) -> str:
    """Ask for step by step reasoning and ``Answer: \\boxed{..}`` on the last line."""
    return BOXED_PROMPT.format(question=question)


def critic_question(question: str, first_step: str) -> str:
    """Return the critic's first message; the question has an ``<image>`` for each of its images."""
    return f"### Question:\n{question}\n\n### Solution Process:\n{first_step}"

"""Starts of a user turn, from which the target invents whole instructions.

The empty start gives what the model itself finds likely; the others steer it to the kinds
of work people speculate for: code, mathematics, structured text, plain chat."""

OPENERS = {
    "free": [""] * 4,
    "chat": [
        "How do I", "What is the difference between", "Explain why", "Give me some tips for", "Can you help me",
        "Tell me about the history of", "Write a short story about", "Write an email to", "Summarize the following",
        "What are the main causes of", "Describe how", "Suggest a name for", "Write a poem about", "Compare",
        "Imagine you are", "Why do people", "Plan a trip to", "List five", "Rewrite the following sentence",
        "Translate the following into", "Act as a", "Pretend that you are", "Draft a blog post about", "Should I",
    ],
    "math": [
        "Solve the equation", "A train travels", "Tom has", "A shop sells", "If x +", "Find the value of", "Calculate the",
        "There are", "Maria buys", "A rectangle has", "What is the sum of", "Simplify the expression", "The price of",
        "How many", "In a class of", "Let f(x) =", "Find all real numbers", "A farmer has", "Each week, Sam",
        "A box contains", "Evaluate", "The ratio of", "What is the probability that", "If a car uses",
    ],
    "code": [
        "Write a Python function that", "Write a python function to find", "Write a function to check whether",
        "Fix the bug in this code:\n```python\n", "Explain this code:\n```python\ndef ", "Implement a class",
        "Complete this function so that it passes its tests:\n```python\ndef ", "Write a SQL query that",
        "Write a JavaScript function", "Write unit tests for this function:\n```python\ndef ",
        "Complete the following function.\n```python\nfrom typing import List\n\ndef ", "Write a program that",
        "Refactor this code:\n```python\n", "Rename the variable", "Add a docstring to this function:\n```python\ndef ",
        "Change this function so that it returns", "Write a Python script to", "Convert this loop into",
        "Add type hints to this function and return the whole function:\n```python\ndef ", "Write a regular expression that",
    ],
    "structured": [
        "Extract the name, date and amount as JSON:\n", "Return a JSON object with the keys", "Convert this text to JSON:\n",
        "Make a table of", "Write a YAML file for", "Turn this list into a markdown table:\n", "Fill in this form as JSON:\n",
        "You can call these tools:\n", "Extract all people and places from this text and answer in JSON only:\n",
        "Convert this CSV to JSON:\nname,", "Write a configuration file for", "List the items as a JSON array:\n",
        "Write the HTML for", "Format these records as CSV:\n", "Call the function get_weather for",
        "Answer with one JSON object with the fields", "Classify this review as positive or negative and answer in JSON:\n",
        "Write a YAML description of a service with", "Create a table with the columns",
    ],
}


def all_openers() -> list[tuple[str, str]]:
    """(kind, opener) pairs, kinds interleaved so that any prefix of the list is a mix."""
    longest = max(len(openers) for openers in OPENERS.values())
    return [(kind, openers[i % len(openers)]) for i in range(longest) for kind, openers in OPENERS.items()]

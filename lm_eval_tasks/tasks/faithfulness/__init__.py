"""The paper's five faithfulness sets: does the answer follow the given document?"""

from vla_dist.testing.zoo import zoo_cases


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = zoo_cases()
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])

"""The diagonal against the diagonal of the dense matrix."""

from hypothesis import given
from hypothesis import strategies as st

from tests.cases import LOSSES, make_case
from tests.reference import assert_agrees


def test_a_precision_for_each_tensor():
    case = make_case("batch_norm", "binary_3")
    precision = {name: 10.0 ** (i - 4) for i, name in enumerate(case.names)}
    assert_agrees(
        case.evidence(structure="diag", prior_precision=precision), case.reference(precision, "diag")
    )


@given(
    st.sampled_from(["linear", "mlp", "conv", "batch_norm"]), st.sampled_from(list(LOSSES)), st.floats(-3, 3)
)
def test_the_diagonal_never_believes_more_than_the_whole_matrix(network, loss, log_precision):
    """Hadamard: ln det(I + G/λ) ≤ Σ ln(1 + Gᵢᵢ/λ). It is the certified lower bound that it says it is."""
    case, precision = make_case(network, loss), 10**log_precision
    diagonal = case.evidence(structure="diag", prior_precision=precision)
    whole = case.evidence(structure="full", prior_precision=precision)
    assert diagonal.lower == diagonal.log_evidence <= whole.log_evidence + 1e-9
    assert whole.log_evidence <= diagonal.upper

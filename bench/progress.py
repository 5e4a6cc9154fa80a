"""The live line: how far the run is and how it goes, on stderr."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

from .records import MeasuredRequest


class Progress:
    """Counts requests as they are sent and end."""

    def __init__(self, num_requests: int, *, disabled: bool) -> None:
        self._bar = tqdm(total=num_requests, disable=disabled, unit="req")
        self._num_running = 0
        self._num_ok = 0
        self._num_failed = 0
        self._sum_ttft_s = 0.0
        self._sum_itl_s = 0.0
        self._num_itls = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def sent(self) -> None:
        self._num_running += 1
        self._bar.set_postfix_str(self.text(), refresh=False)

    def finished(self, record: MeasuredRequest) -> None:
        self._num_running -= 1
        if record.ok:
            self._num_ok += 1
            self._sum_ttft_s += record.ttft_s or 0.0
            gaps_s = record.itls_s
            self._sum_itl_s += sum(gaps_s)
            self._num_itls += len(gaps_s)
        else:
            self._num_failed += 1
        self._bar.set_postfix_str(self.text(), refresh=False)
        self._bar.update()

    def text(self) -> str:
        parts = [f"running {self._num_running}", f"failed {self._num_failed}"]
        if self._num_ok:
            parts.append(f"TTFT {self._sum_ttft_s / self._num_ok * 1e3:.1f} ms")
        if self._num_itls:
            parts.append(f"ITL {self._sum_itl_s / self._num_itls * 1e3:.2f} ms")
        return ", ".join(parts)

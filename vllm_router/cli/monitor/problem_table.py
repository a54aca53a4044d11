"""The monitor's texts for problems: why there is no router, and what it refuses. As `TEXTS`."""

from __future__ import annotations

from vllm_router.cli.common import KEY_ADVICE

PROBLEMS: dict[str, tuple[str, str]] = {
    "trouble_stopping": ("the router is stopping", "路由器正在停止"),
    "trouble_closed": ("the router closed the connection", "路由器关闭了连接"),
    "trouble_slow": ("no answer in time", "没有及时响应"),
    "trouble_key": (
        "it needs its status or admin key (--key or VLLM_ROUTER_KEY)",
        "它需要状态密钥或管理密钥（--key 或 VLLM_ROUTER_KEY）",
    ),
    "trouble_status": (
        "it answers {status}: it is no vLLM Router, or does not accept this client",
        "它返回 {status}：它不是 vLLM Router，或不接受此客户端",
    ),
    "trouble_silent": (
        "the router was silent for {seconds} s",
        "路由器已 {seconds} 秒没有发送数据",
    ),
    "trouble_other": (
        "not the feed of a vLLM Router: {error}",
        "不是 vLLM Router 的数据：{error}",
    ),
    "trouble_protocol": (
        "the router does not speak the feed's protocol",
        "路由器的协议不符",
    ),
    "trouble_newer": (
        "the router {version} is newer than this program",
        "路由器 {version} 比本程序新",
    ),
    "trouble_no_router": ("no router answers at {url}: {why}", "{url} 没有路由器响应：{why}"),
    # The operating system's.
    "trouble_os_refused": ("Connection refused", "连接被拒绝"),
    "trouble_os_reset": ("Connection reset by peer", "连接被重置"),
    "trouble_os_timeout": ("Connection timed out", "连接超时"),
    "trouble_os_host": ("No route to host", "无法到达主机"),
    "trouble_os_network": ("Network is unreachable", "无法到达网络"),
    "trouble_os_name": ("Name or service not known", "主机名未知"),
    "trouble_os_resolver": ("Temporary failure in name resolution", "暂时无法解析主机名"),
    # Refusals. The page has the other ones.
    "refusal_missing_api_key": (
        KEY_ADVICE["missing_api_key"],
        "此路由器需要密钥：请用 --key 或变量 VLLM_ROUTER_KEY 给出它的状态密钥或管理密钥",
    ),
    "refusal_invalid_api_key": (
        KEY_ADVICE["invalid_api_key"],
        "路由器不接受该密钥：--key 或 VLLM_ROUTER_KEY 必须是状态密钥；修改时须是管理密钥",
    ),
}

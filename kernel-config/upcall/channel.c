// SPDX-License-Identifier: GPL-2.0
/*
 * The connection to the host: dialled, kept, dialled again when it is lost. One thread, which serves the requests too, so
 * there is one at a time, and nothing here needs a lock.
 *
 * It has to work when user space does not: buffers are there from the start, the socket calls may use the memory that is kept
 * for getting memory back, and the thread goes before all that does not ask to be real-time.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/build_bug.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/minmax.h>
#include <linux/module.h>
#include <linux/net.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/prio.h>
#include <linux/socket.h>
#include <linux/uio.h>
#include <linux/vm_sockets.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#include "upcall.h"

/* Ports from here down: only who may bind those, in the guest's first user namespace, can pose as this driver. */
#define FIRST_PORT 1023
#define LAST_PORT 512

/* How long a host that was dialled may take to answer HELLO. */
#define WELCOME_MS 10000
/* Pauses between attempts: each four times the one before. */
#define PAUSE_MS 10
#define PAUSE_GROWTH 4
#define PAUSE_REFUSED_MS 5000
#define PAUSE_NOBODY_MS 60000

struct frame {
	struct ctvm_upcall_header header;
	u8 payload[CTVM_UPCALL_MAX_LEN];
};

static struct frame request, reply;
/* Of this life of the VM; 0 before the first WELCOME. */
static u64 epoch;

static_assert(sizeof(struct ctvm_upcall_header) == 40);
static_assert(offsetof(struct frame, payload) % 8 == 0);

/* What became of an attempt, worst first. */
enum outcome { NOBODY, REFUSED, SERVED };

/* --- bytes --- */

static int send_some(struct socket *sock, void *data, size_t len)
{
	struct msghdr msg = { .msg_flags = MSG_NOSIGNAL };
	struct kvec vec = { .iov_base = data, .iov_len = len };
	unsigned int flags = memalloc_noreclaim_save();
	int sent = kernel_sendmsg(sock, &msg, &vec, 1, len);

	memalloc_noreclaim_restore(flags);
	return sent ?: -EPIPE;
}

/* -ENOTCONN: the host hung up. */
static int receive_some(struct socket *sock, void *data, size_t len)
{
	struct msghdr msg = { };
	struct kvec vec = { .iov_base = data, .iov_len = len };
	unsigned int flags = memalloc_noreclaim_save();
	int got = kernel_recvmsg(sock, &msg, &vec, 1, len, 0);

	memalloc_noreclaim_restore(flags);
	return got ?: -ENOTCONN;
}

static int send_all(struct socket *sock, void *data, size_t len)
{
	int sent;

	for (; len; data += sent, len -= sent) {
		sent = send_some(sock, data, len);
		if (sent < 0)
			return sent;
	}
	return 0;
}

static int receive_all(struct socket *sock, void *data, size_t len)
{
	int got;

	for (; len; data += got, len -= got) {
		got = receive_some(sock, data, len);
		if (got < 0)
			return got;
	}
	return 0;
}

/* --- frames --- */

static void fill_header(struct ctvm_upcall_header *header, u16 type, u32 len, u32 status, u64 seq)
{
	*header = (struct ctvm_upcall_header) {
		.magic = cpu_to_le32(CTVM_UPCALL_MAGIC),
		.version = cpu_to_le16(CTVM_UPCALL_VERSION),
		.type = cpu_to_le16(type),
		.len = cpu_to_le32(len),
		.status = cpu_to_le32(status),
		.epoch = cpu_to_le64(epoch),
		.seq = cpu_to_le64(seq),
	};
}

static int send_frame(struct socket *sock, struct frame *frame)
{
	return send_all(sock, frame, sizeof(frame->header) + le32_to_cpu(frame->header.len));
}

static int violation(const char *what, u64 value)
{
	pr_warn_ratelimited("host sent a frame with %s %llu, hanging up\n", what, value);
	return -EPROTO;
}

static int receive_frame(struct socket *sock, struct frame *frame)
{
	const struct ctvm_upcall_header *header = &frame->header;
	u32 len;
	int err;

	err = receive_all(sock, &frame->header, sizeof(frame->header));
	if (err)
		return err;
	if (le32_to_cpu(header->magic) != CTVM_UPCALL_MAGIC)
		return violation("magic", le32_to_cpu(header->magic));
	if (le16_to_cpu(header->version) != CTVM_UPCALL_VERSION)
		return violation("version", le16_to_cpu(header->version));
	len = le32_to_cpu(header->len);
	if (len > CTVM_UPCALL_MAX_LEN)
		return violation("length", len);
	return receive_all(sock, frame->payload, len);
}

/* --- connection --- */

/* A connected socket, or NULL: no vsock yet, or nobody at the port. */
static struct socket *dial(void)
{
	struct sockaddr_vm us = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = CTVM_UPCALL_PORT };
	unsigned int flags = memalloc_noreclaim_save();
	struct socket *sock = NULL;
	int err = sock_create_kern(&init_net, AF_VSOCK, SOCK_STREAM, 0, &sock);

	if (err)
		goto out;
	/* A port is in use for some seconds after a connection from it has ended. */
	us.svm_port = FIRST_PORT;
	do {
		err = kernel_bind(sock, (void *)&us, sizeof(us));
	} while (err == -EADDRINUSE && us.svm_port-- > LAST_PORT);
	/* Ends after vsock's own two seconds if nobody says anything at all. */
	if (!err)
		err = kernel_connect(sock, (void *)&host, sizeof(host), 0);
	if (err) {
		sock_release(sock);
		sock = NULL;
	}
out:
	memalloc_noreclaim_restore(flags);
	return sock;
}

/* Says HELLO and hears the answer. */
static enum outcome introduce(struct socket *sock)
{
	static u32 told;
	u32 status;
	u16 type;

	upcall_fill_hello((void *)reply.payload);
	fill_header(&reply.header, CTVM_UPCALL_HELLO, sizeof(struct ctvm_upcall_hello), 0, 0);
	sock->sk->sk_rcvtimeo = msecs_to_jiffies(WELCOME_MS);
	if (send_frame(sock, &reply) || receive_frame(sock, &request))
		return NOBODY;
	sock->sk->sk_rcvtimeo = MAX_SCHEDULE_TIMEOUT;

	type = le16_to_cpu(request.header.type);
	status = le32_to_cpu(request.header.status);
	switch (type) {
	case CTVM_UPCALL_WELCOME:
		if (!request.header.epoch) {
			violation("epoch", 0);
			return NOBODY;
		}
		epoch = le64_to_cpu(request.header.epoch);
		told = 0;
		return SERVED;
	case CTVM_UPCALL_REFUSED:
		if (told != status)
			pr_notice("the host refuses this guest: error %u\n", status);
		told = status;
		return REFUSED;
	default:
		violation("type in place of WELCOME", type);
		return NOBODY;
	}
}

/* Answers one request after the other, until the connection ends. */
static void serve(struct socket *sock)
{
	bool answered = false;
	u64 seq, last = 0;
	u32 deadline_ms;
	int err;

	do {
		struct upcall_request asked = { .payload = request.payload, .reply = reply.payload };

		if (receive_frame(sock, &request))
			return;
		seq = le64_to_cpu(request.header.seq);
		asked.type = le16_to_cpu(request.header.type);
		asked.len = le32_to_cpu(request.header.len);
		if (le64_to_cpu(request.header.epoch) != epoch) {
			pr_warn_ratelimited("request %llu is of another epoch, not served\n", seq);
			/* In the request's place: the last reply may be asked for yet. */
			fill_header(&request.header, asked.type | CTVM_UPCALL_REPLY, 0, ESTALE, seq);
			err = send_frame(sock, &request);
			continue;
		}
		if (answered && seq < last) {
			violation("sequence number", seq);
			return;
		}
		if (!answered || seq != last) {
			u32 status;

			deadline_ms = le32_to_cpu(request.header.deadline_ms);
			asked.deadline = deadline_ms ? ktime_add_ms(ktime_get(), deadline_ms) : KTIME_MAX;
			status = upcall_answer(&asked);
			fill_header(&reply.header, asked.type | CTVM_UPCALL_REPLY, asked.reply_len, status, seq);
			answered = true;
			last = seq;
		}
		err = send_frame(sock, &reply);
	} while (!err);
}

static enum outcome converse(void)
{
	struct socket *sock = dial();
	enum outcome outcome;

	if (!sock)
		return NOBODY;
	outcome = introduce(sock);
	if (outcome == SERVED)
		serve(sock);
	sock_release(sock);
	return outcome;
}

static int upcall_thread(void *unused)
{
	unsigned int pause = PAUSE_MS;

	/*
	 * Before ordinary programs. Not real-time: where a program is, and spins at a higher priority, all of that class
	 * stands still while the kernel keeps time for the others, and the program comes first while it does not.
	 */
	sched_set_normal(current, MIN_NICE);
	for (;;) {
		switch (converse()) {
		case SERVED:
			pause = PAUSE_MS;
			break;
		case REFUSED:
			pause = min_t(unsigned int, pause, PAUSE_REFUSED_MS);
			break;
		case NOBODY:
			break;
		}
		schedule_timeout_idle(msecs_to_jiffies(pause));
		pause = min_t(unsigned int, pause * PAUSE_GROWTH, PAUSE_NOBODY_MS);
	}
	return 0;
}

/* For who serves the channel in another way, as tests do. */
static bool off;
module_param(off, bool, 0);
MODULE_PARM_DESC(off, "do not dial the host");

static int __init upcall_init(void)
{
	struct task_struct *task;
	int err;

	if (off)
		return 0;
	err = upcall_jobs_init();
	if (err)
		return err;
	task = kthread_run(upcall_thread, NULL, "ctvm_upcall");
	return PTR_ERR_OR_ZERO(task);
}
late_initcall(upcall_init);

MODULE_DESCRIPTION("Upcall channel of the ctvm virtual machine monitor");
MODULE_LICENSE("GPL");

// SPDX-License-Identifier: GPL-2.0
/* virtio-mmio devices that come and go. Those of the command line are on the same bus, and can go too. */
#include <linux/device.h>
#include <linux/errno.h>
#include <linux/err.h>
#include <linux/ioport.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/platform_device.h>
#include <linux/sizes.h>
#include <linux/string.h>

#include "upcall.h"

#define NAME "virtio-mmio"
/* Registers before a device's own configuration, and more than any device has with it (virtio 1.2, 4.2.2). */
#define MIN_SIZE 0x100
#define MAX_SIZE SZ_1M
#define MAX_ADDED 32

static struct platform_device *added[MAX_ADDED];

u32 upcall_devices(void)
{
	u32 i, count = 0;

	for (i = 0; i < MAX_ADDED; i++)
		count += !!added[i];
	return count;
}

static struct platform_device **slot_of(struct platform_device *pdev)
{
	u32 i;

	for (i = 0; i < MAX_ADDED; i++)
		if (added[i] == pdev)
			return &added[i];
	return NULL;
}

static int is_at(struct device *dev, const void *base)
{
	struct platform_device *pdev = to_platform_device(dev);
	const struct resource *mem = platform_get_resource(pdev, IORESOURCE_MEM, 0);

	return mem && mem->start == *(const u64 *)base && !strcmp(pdev->name, NAME);
}

/* The device with registers at `base`, held, or NULL. */
static struct platform_device *find(u64 base)
{
	struct device *dev = bus_find_device(&platform_bus_type, NULL, &base, is_at);

	return dev ? to_platform_device(dev) : NULL;
}

static bool is_same(struct platform_device *pdev, u64 size, u32 irq)
{
	const struct resource *mem = platform_get_resource(pdev, IORESOURCE_MEM, 0);
	const struct resource *line = platform_get_resource(pdev, IORESOURCE_IRQ, 0);

	return resource_size(mem) == size && line && line->start == irq;
}

/* 0 if a driver has it, or -ENODEV: virtio-mmio looked and found no device that it knows. */
static int is_driven(struct platform_device *pdev)
{
	bool bound;

	device_lock(&pdev->dev);
	bound = pdev->dev.driver;
	device_unlock(&pdev->dev);
	return bound ? 0 : -ENODEV;
}

static int register_device(u64 base, u64 size, u32 irq, struct platform_device **slot)
{
	const struct resource resources[] = {
		DEFINE_RES_MEM(base, size),
		DEFINE_RES_IRQ(irq),
	};
	const struct platform_device_info info = {
		.name = NAME,
		.id = PLATFORM_DEVID_AUTO,
		.res = resources,
		.num_res = ARRAY_SIZE(resources),
	};
	struct platform_device *pdev = platform_device_register_full(&info);
	int err;

	if (IS_ERR(pdev))
		return PTR_ERR(pdev);
	err = is_driven(pdev);
	if (err)
		platform_device_unregister(pdev);
	else
		*slot = pdev;
	return err;
}

/* What is there already, with the same values, is what was asked for. */
int upcall_add_device(struct upcall_request *request)
{
	const struct ctvm_upcall_device *device = request->payload;
	u64 base = le64_to_cpu(device->base), size = le64_to_cpu(device->size);
	struct platform_device *pdev, **slot;
	u32 irq = le32_to_cpu(device->irq);
	int err;

	if (size < MIN_SIZE || size > MAX_SIZE || base + size < base || irq > INT_MAX)
		return -EINVAL;
	/* The bus would find nothing wrong with registers in memory. */
	if (region_intersects(base, size, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) != REGION_DISJOINT)
		return -EINVAL;
	pdev = find(base);
	if (pdev) {
		err = is_same(pdev, size, irq) ? is_driven(pdev) : -EEXIST;
		put_device(&pdev->dev);
		return err;
	}
	slot = slot_of(NULL);
	if (!slot)
		return -ENOSPC;
	return register_device(base, size, irq, slot);
}

/* What is not there has been removed. */
int upcall_remove_device(struct upcall_request *request)
{
	const struct ctvm_upcall_device *device = request->payload;
	struct platform_device *pdev = find(le64_to_cpu(device->base));
	struct platform_device **slot;

	if (!pdev)
		return 0;
	slot = slot_of(pdev);
	if (slot)
		*slot = NULL;
	platform_device_unregister(pdev);
	put_device(&pdev->dev);
	return 0;
}
